"""Segmentation without training, by cosines to prototypes of the same features.

`nearest_prototype` takes the supports' prototypes as they are. `self_supported` mixes
them with the query's own: what a query shows resembles itself more than any support
does, so the pixels that are surely like the supports' object, and those that surely
aren't, make prototypes again. Source: Fan et al., Self-Support Few-Shot Semantic
Segmentation, ECCV 2022, without its background of each pixel, which finds less here
(docs/starter.md).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer, PyTree

from qpenet_jax.backbones.registry import Backbone, features
from qpenet_jax.core.types import FEATURE_STRIDE, Array
from qpenet_jax.evaluation.predictor import STATIC, NetworkPredictor, Predictor
from qpenet_jax.models.ops import resize_align_corners
from qpenet_jax.models.prototypes import (
    NORM_EPSILON,
    activation_map,
    foreground_margin,
    foreground_on_grid,
    masked_average_pool,
)
from qpenet_jax.models.qpenet import ROLES

SHARPNESS = 10.0
"""What differences of cosines are multiplied by, before they are taken for logits."""

SURE = {"background": 0.6, "foreground": 0.7}
"""Probability from which on a pixel of the query is taken for a prototype."""

FEWEST = 12
"""Pixels that are taken at least: the surest, where fewer are sure enough."""


def nearest_prototype(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
    query_features: Float[Array, "b h w f"],
) -> tuple[Float[Array, "b H W 2"], dict[str, Array]]:
    """Calls a query pixel foreground if it is closer to the supports' foreground mean.

    Logits are the cosines to the mean of the background (0) and of the foreground (1),
    each averaged over the K supports; pixels labelled 255 belong to neither. It has no
    parameters: what QPENet learns is what it gains over this.
    """
    height, width = support_masks.shape[-2:]
    cosines = [
        activation_map(query_features, prototype)
        for prototype in prototypes(support_features, support_masks)
    ]
    logits = jnp.stack(cosines, axis=-1)
    return resize_align_corners(logits, (height, width)), {"cosines": logits}


def prototypes(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
) -> tuple[Float[Array, "b f"], Float[Array, "b f"]]:
    """Returns the supports' mean of the background and of the foreground."""
    grid = support_features.shape[2], support_features.shape[3]
    foreground = foreground_on_grid(support_masks, grid)
    background = foreground_on_grid(1 - support_masks.astype(jnp.int32), grid)
    of_background, of_foreground = (
        masked_average_pool(support_features, m).mean(1)
        for m in (background, foreground)
    )
    return of_background, of_foreground


def self_supported(
    support_features: Float[Array, "b k h w f"],
    support_masks: Integer[Array, "b k H W"],
    query_features: Float[Array, "b h w f"],
    query_photo: Bool[Array, "b h w"],
) -> tuple[Float[Array, "b H W 2"], dict[str, Array]]:
    """Calls a query pixel foreground if it is closer to the foreground's prototype.

    Prototypes are halfway between the supports' means and those of the query, all of
    length 1; `query_photo` is false beside the photo. Logits are cosines, to the
    background (0) and to the foreground (1). `out` holds them on the grid, and which
    pixels of the query were taken. It has no parameters.
    """
    of_supports = prototypes(support_features, support_masks)
    background, foreground = (activation_map(query_features, p) for p in of_supports)
    likely = jax.nn.sigmoid(SHARPNESS * (foreground - background))
    out, cosines = {}, []
    for (ground, least), of_support, probability in zip(
        SURE.items(), of_supports, (1 - likely, likely), strict=True
    ):
        sure = _sure(probability, query_photo, least)
        own = masked_average_pool(query_features, sure)
        mixed = _unit(of_support) + _unit(own)  # a cosine doesn't see the length
        cosines.append(activation_map(query_features, mixed))
        out[f"sure_{ground}"] = sure
    out["cosines"] = jnp.stack(cosines, axis=-1)
    height, width = support_masks.shape[-2:]
    return resize_align_corners(out["cosines"], (height, width)), out


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), NORM_EPSILON)


def _sure(probability, photo, least):
    """Returns the pixels of a photo that are likely enough, or the FEWEST likeliest."""
    inside = jnp.where(photo, probability, -1.0)
    flat = inside.reshape(inside.shape[0], -1)
    likeliest, _ = jax.lax.top_k(flat, min(FEWEST, flat.shape[1]))
    return photo & (inside >= jnp.minimum(likeliest[:, -1], least)[:, None, None])


_features = jax.jit(features, static_argnums=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingFreePredictor(Predictor):
    """`nearest_prototype` or, with `mixes`, `self_supported`; margins times `scale`."""

    backbone: Backbone = dataclasses.field(metadata=STATIC)
    weights: PyTree[Array]
    mixes: bool = dataclasses.field(default=False, metadata=STATIC)
    scale: float = dataclasses.field(default=1.0, metadata=STATIC)

    def encode(self, images, roles=ROLES, padding=None):
        """Returns the features, and which cells hold the photo."""
        del roles
        maps = _features(self.backbone, self.weights, images)
        if padding is None:
            return {"maps": maps, "photo": jnp.ones(maps.shape[:3], bool)}
        return {"maps": maps, "photo": ~padding[:, ::FEATURE_STRIDE, ::FEATURE_STRIDE]}

    @functools.partial(jax.jit, static_argnames="named")
    def decode(self, supports, masks, query, *, named=False):
        """Returns the margin; see `Predictor`."""
        maps = jnp.stack([support["maps"] for support in supports], axis=1)
        if self.mixes:
            logits, out = self_supported(maps, masks, query["maps"], query["photo"])
        else:
            logits, out = nearest_prototype(maps, masks, query["maps"])
        margin = self.scale * foreground_margin(logits)
        return (margin, out) if named else margin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MeanPredictor(Predictor):
    """The mean of two probabilities: of a network, and of self-support.

    Each finds what the other misses: the network, where it has seen the like in
    training; features alone, where it hasn't (docs/starter.md). The backbone of the
    second has the stages of the first and others after them; an image passes it once
    for both.
    """

    network: NetworkPredictor
    training_free: TrainingFreePredictor

    def encode(self, images, roles=ROLES, padding=None):
        """Returns what each of the two makes of images."""
        found = self.training_free.encode(images, roles, padding)
        return self.network.encode_maps(found["maps"], roles), found

    def decode(self, supports, masks, query, *, named=False):
        """Returns the margin; see `Predictor`."""
        for_network, for_free = zip(*supports, strict=True)
        margin = self.network.decode(for_network, masks, query[0], named=named)
        free = self.training_free.decode(for_free, masks, query[1], named=named)
        if not named:
            return mean_margin(margin, free)
        return mean_margin(margin[0], free[0]), margin[1] | free[1]

    def crop_supports(self, supports, masks):
        """Returns the network's part cropped; self-support needs all of its own."""
        network, training_free = zip(*supports, strict=True)
        cropped = self.network.crop_supports(network, masks)
        return tuple(zip(cropped, training_free, strict=True))


@jax.jit
def mean_margin(*margins: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the logit of the mean probability of several margins."""
    log_p, log_q = (
        jax.nn.logsumexp(jax.nn.log_sigmoid(sign * jnp.stack(margins)), axis=0)
        for sign in (1, -1)
    )
    return log_p - log_q
