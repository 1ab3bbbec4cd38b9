"""The forward path of everything that isn't training: encode images, decode episodes.

`evaluate`, `predict`, `figures`, the benchmark and the library all predict by it.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, PyTree, UInt8

from qpenet_jax.backbones.precision import InDtype, in_dtype
from qpenet_jax.backbones.registry import Backbone, features, with_deep
from qpenet_jax.core.types import Array, Episode
from qpenet_jax.models.layers import Convs
from qpenet_jax.models.prototypes import foreground_margin, foreground_on_grid
from qpenet_jax.models.qpenet import ROLES, QPENet, Role
from qpenet_jax.models.released.network import ReleasedQPENet

Images = UInt8[np.ndarray, "b s s 3"]
Padding = Bool[np.ndarray, "b s s"]
Masks = Integer[np.ndarray, "b k s s"]
Margin = Float[Array, "b s s"]
"""Logit of the foreground minus that of the background: positive means foreground."""

STATIC = {"static": True}
"""Of fields that are no parameters: what is compiled depends on them."""

WINDOW_STEP = 8
"""A window's side in cells is a multiple of it: few sizes, as each is compiled once."""


class Predictor(abc.ABC):
    """A network in two parts, so that what depends on one image is computed once.

    The predictors below are trees of their parameters, which `jax.device_put` moves;
    other parameters of the same network need no compilation.
    """

    @abc.abstractmethod
    def encode(
        self,
        images: Images,
        roles: tuple[Role, ...] = ROLES,
        padding: Padding | None = None,
    ) -> PyTree[Array]:
        """Returns a tree of arrays that start with the images' axis.

        `roles` says what the images will be: "support", "query" or both; `padding`
        where they hold no photo.
        """

    @abc.abstractmethod
    def decode(
        self,
        supports: Sequence[PyTree[Array]],
        masks: Masks,
        query: PyTree[Array],
        *,
        named: bool = False,
    ) -> Any:
        """Returns the `Margin`, given the encoded images of K supports and the query's.

        With `named`, returns also the named intermediates, as `QPENet.__call__` does.
        """

    def crop_supports(
        self, supports: Sequence[PyTree[Array]], masks: Masks
    ) -> Sequence[PyTree[Array]]:
        """Returns of encoded supports all that the margin depends on.

        It saves time where supports meet many queries.
        """
        del masks
        return supports

    def __call__(
        self, episode: Episode, *, in_both_roles: bool = False, named: bool = False
    ) -> Any:
        """Returns the `Margin` in a batch of episodes; `named` is that of `decode`.

        Images are encoded in their own role. With `in_both_roles` they are encoded in
        every role, which takes what is compiled for scoring.
        """
        of_supports: tuple[Role, ...] = ROLES if in_both_roles else ("support",)
        of_query: tuple[Role, ...] = ROLES if in_both_roles else ("query",)
        images, padding = episode.support_images, episode.support_padding
        supports = tuple(
            self.encode(
                images[:, k], of_supports, None if padding is None else padding[:, k]
            )
            for k in range(images.shape[1])
        )
        query = self.encode(episode.query_image, of_query, episode.query_padding)
        inputs = supports, episode.support_masks, query
        # `named=False` would be compiled apart from the calls that don't say it.
        return self.decode(*inputs, named=True) if named else self.decode(*inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NetworkPredictor(Predictor):
    """QPENet with its parameters over a backbone with its weights."""

    model: InDtype = dataclasses.field(metadata=STATIC)
    backbone: Backbone = dataclasses.field(metadata=STATIC)
    params: PyTree[Array]
    weights: PyTree[Array]

    @functools.partial(jax.jit, static_argnames="roles")
    def encode(self, images, roles=ROLES, padding=None):
        """Returns what the network makes of images alone; see `Predictor`."""
        maps = features(self.backbone, self.weights, images)
        inputs = (maps, padding) if self.model.sees_padding else (maps,)
        return self.model.apply(self._variables, *inputs, roles=roles, method="encode")

    @functools.partial(jax.jit, static_argnames="roles")
    def encode_maps(self, maps, roles=ROLES):
        """Returns what `encode` does, given features that begin with the backbone's."""
        own = maps[..., : self.backbone.channels]
        return self.model.apply(self._variables, own, roles=roles, method="encode")

    @functools.partial(jax.jit, static_argnames="named")
    def decode(self, supports, masks, query, *, named=False):
        """Returns the margin; see `Predictor`."""
        stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *supports)
        logits, out = self.model.apply(
            self._variables, stacked, masks, query, method="decode"
        )
        margin = foreground_margin(logits)
        return (margin, out) if named else margin

    def crop_supports(self, supports, masks):
        """Returns the surroundings of the foreground, on which QPENet's margin depends.

        That of a class derived from it may depend on the whole support.
        """
        if type(self.model.module) is not QPENet:
            return supports
        return around_foreground(supports, masks)

    @property
    def _variables(self):
        return with_deep(self.params, self.weights)


def qpenet_predictor(
    model: QPENet | ReleasedQPENet,
    backbone: Backbone,
    params: PyTree[Array],
    weights: PyTree[Array],
    dtype: str = "float32",
) -> NetworkPredictor:
    """Returns QPENet over a backbone; both compute in `dtype`."""
    return NetworkPredictor(*in_dtype(model, backbone, dtype), params, weights)


def around_foreground(
    supports: Sequence[Mapping[str, Array]], masks: Integer[np.ndarray, "1 k s s"]
) -> Sequence[Mapping[str, Array]]:
    """Cuts K encoded supports [1, h, w, c] to square windows around their foreground.

    DPE asks which of a support's foreground the query's prototype finds, and FFA
    attends to the foreground alone. A window holds all cells that are at most
    `Convs.REACH` from it, and `M_s` says which are foreground. A support alone stays
    whole, as do those that have one without foreground among them.
    """
    _, height, width, _ = next(iter(supports[0].values())).shape
    grid = height, width
    M_s = np.asarray(foreground_on_grid(masks[0], grid))
    if len(supports) == 1 or not M_s.any(axis=(1, 2)).all():
        return supports
    ranges = [_ranges(np.any(M_s, axis=axis)) for axis in (2, 1)]
    longest = max(int((end - first).max()) for first, end in ranges)
    side = min(-(-longest // WINDOW_STEP) * WINDOW_STEP, *grid)
    rows, columns = (
        np.clip(first, 0, cells - side)
        for (first, _), cells in zip(ranges, grid, strict=True)
    )
    parts = []
    for support, marked, y, x in zip(supports, M_s, rows, columns, strict=True):
        window = np.s_[:, y : y + side, x : x + side]
        part = {name: np.asarray(array)[window] for name, array in support.items()}
        parts.append(part | {"M_s": marked[None][window]})
    return tuple(jax.device_put(parts))


def _ranges(marked: Bool[np.ndarray, "k n"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the surroundings of K foregrounds begin and end."""
    first = marked.argmax(axis=1) - Convs.REACH
    end = marked.shape[1] - marked[:, ::-1].argmax(axis=1) + Convs.REACH
    return first, end
