"""The forward path of everything that isn't training: encode images, decode episodes.

`evaluate`, `predict`, `figures`, the benchmark and the library all predict by it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float, PyTree, UInt8

from qpenet_jax.backbones.precision import backbone_in_dtype, in_dtype
from qpenet_jax.backbones.registry import Backbone, deep_part, features, with_deep
from qpenet_jax.core.types import FEATURE_STRIDE, Array, Episode
from qpenet_jax.evaluation.focus import around_foreground
from qpenet_jax.evaluation.training_free import (
    SHARPNESS,
    nearest_prototype,
    self_supported,
)
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.models.qpenet import ROLES, QPENet, Role
from qpenet_jax.models.released.network import ReleasedQPENet

Images = UInt8[np.ndarray, "b s s 3"]
Margin = Float[Array, "b s s"]
"""Logit of the foreground minus that of the background: positive means foreground."""


def _whole(supports: Any, masks: Any) -> Any:
    del masks
    return supports


class Predictor(NamedTuple):
    """A network in two parts, so that what an image alone tells is computed once.

    `encode(images, roles, padding)` returns a tree of arrays that start with the
    images' axis; `roles` says what the images will be: "support", "query" or both, and
    `padding` [b, s, s] where they hold no photo, if anything is said of it.
    `decode(supports, masks, query)` takes the encoded images of the K supports one
    after the other, the masks [b, K, s, s] and the query's, and returns the `Margin`;
    with `named=True` also the network's named intermediates, as `QPENet.__call__` does.
    All are trees of their parameters (`jax.tree_util.Partial`), which can be moved.
    `focus(supports, masks)` returns of encoded supports all that `decode` looks at for
    the margin: for supports that meet many queries.
    """

    encode: Callable[..., PyTree[Array]]
    decode: Callable[..., Any]
    focus: Callable[..., Any] = Partial(_whole)

    def __call__(self, episode: Episode) -> Margin:
        """Returns the margin in a batch of episodes."""
        return self.decode(*self._encoded(episode))

    def look(self, episode: Episode) -> tuple[Margin, dict[str, Any]]:
        """Returns the margin and every named intermediate."""
        return self.decode(*self._encoded(episode), named=True)

    def as_scored(self, episode: Episode) -> Margin:
        """Returns the margin by what is compiled for scoring: images in every role."""
        return self.decode(*self._encoded(episode, ROLES, ROLES))

    def _encoded(
        self,
        episode,
        of_support: Sequence[Role] = ("support",),
        of_query: Sequence[Role] = ("query",),
    ):
        images, padding = episode.support_images, episode.support_padding
        supports = tuple(
            self.encode(
                images[:, k],
                of_support,
                None if padding is None else padding[:, k],
            )
            for k in range(images.shape[1])
        )
        query = self.encode(episode.query_image, of_query, episode.query_padding)
        return supports, episode.support_masks, query


def qpenet_predictor(
    model: QPENet | ReleasedQPENet,
    backbone: Backbone,
    params: PyTree[Array],
    weights: PyTree[Array],
    dtype: str = "float32",
) -> Predictor:
    """Returns QPENet with its parameters over a backbone with its weights.

    Both compute in `dtype`. Compiled once per network, whatever the parameters.
    """
    computing, net = in_dtype(model, backbone, dtype)
    return Predictor(
        Partial(functools.partial(_encode, computing, net), params, weights),
        Partial(functools.partial(_decode, computing), params, deep_part(weights)),
        _focus_of(model),
    )


def cosine_predictor(
    backbone: Backbone, weights: PyTree[Array], dtype: str = "float32"
) -> Predictor:
    """Returns the training-free baseline over the same features."""
    return _of_features(_features, _decode_nearest_prototype, backbone, weights, dtype)


def self_support_predictor(
    backbone: Backbone, weights: PyTree[Array], dtype: str = "float32"
) -> Predictor:
    """Returns what segments best without training, over the same features."""
    parts = _features_of_photo, _decode_self_supported
    return _of_features(*parts, backbone, weights, dtype)


def mean_predictor(
    model: QPENet,
    backbone: Backbone,
    params: PyTree[Array],
    weights: PyTree[Array],
    others: Sequence[str],
    dtype: str = "float32",
) -> Predictor:
    """Returns the mean of two probabilities: of a network, and of self-support.

    Each finds what the other misses: the network, where it has seen the like in
    training; features alone, where it hasn't (docs/starter.md). Self-support takes
    the `others` of the backbone's stages as well; an image passes it once for both.
    """
    whole = backbone._replace(stages=(*backbone.stages, *others))
    computing, net = in_dtype(model, whole, dtype)
    encode = functools.partial(_encode_both, computing, net, backbone.channels)
    return Predictor(
        Partial(encode, params, weights),
        Partial(functools.partial(_decode_mean, computing), params),
        Partial(functools.partial(_focus_one_of_two, _focus_of(model))),
    )


def _of_features(encode, decode, backbone, weights, dtype) -> Predictor:
    """Returns the two parts as a predictor that has no parameters but the backbone's."""
    net = backbone_in_dtype(backbone, dtype)
    return Predictor(Partial(functools.partial(encode, net), weights), Partial(decode))


def _encode(
    model,
    backbone,
    params,
    weights,
    images,
    roles: Sequence[Role] = ROLES,
    padding=None,
):
    inputs = (images, padding) if model.sees_padding else (images,)
    return _encode_roles(model, backbone, tuple(roles), params, weights, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_roles(model, backbone, roles, params, weights, images, *padding):
    maps = features(backbone, weights, images)
    variables = with_deep(params, weights)
    return model.apply(variables, maps, *padding, roles=roles, method="encode")


@functools.partial(jax.jit, static_argnums=0, static_argnames="named")
def _decode(model, params, weights, supports, masks, query, *, named=False):
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *supports)
    variables = with_deep(params, weights)
    logits, out = model.apply(variables, stacked, masks, query, method="decode")
    margin = foreground_margin(logits)
    return (margin, out) if named else margin


def _focus_of(model):
    """Returns what a network looks at; a class of others may look at all."""
    return Partial(around_foreground if type(model) is QPENet else _whole)


def _features(backbone, weights, images, roles: Sequence[Role] = ROLES, padding=None):
    del roles, padding  # the features are the same whatever they are
    return _backbone_features(backbone, weights, images)


_backbone_features = jax.jit(features, static_argnums=0)


def _encode_both(
    model,
    backbone,
    channels,
    params,
    weights,
    images,
    roles: Sequence[Role] = ROLES,
    padding=None,
):
    features = _features_of_photo(backbone, weights, images, padding=padding)
    maps = features["maps"]
    return _encode_maps(model, channels, tuple(roles), params, maps), features


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_maps(model, channels, roles, params, maps):
    inputs = {"params": params}, maps[..., :channels]  # the network's stages come first
    return model.apply(*inputs, roles=roles, method="encode")


def _decode_mean(model, params, supports, masks, query, *, named=False):
    of_network, of_free = zip(*supports, strict=True)
    found = _decode(model, params, {}, of_network, masks, query[0], named=named)
    free = _decode_self_supported(of_free, masks, query[1], named=named)
    if not named:
        return _mean_margin(found, SHARPNESS * free)
    (margin, out), (free_margin, more) = found, free
    return _mean_margin(margin, SHARPNESS * free_margin), out | more


def _focus_one_of_two(focus, supports, masks):
    of_network, of_free = zip(*supports, strict=True)
    return tuple(zip(focus(of_network, masks), of_free, strict=True))


@jax.jit
def _mean_margin(*margins):
    """Returns the logit of the mean probability of several margins."""
    log_p, log_q = (
        jax.nn.logsumexp(jax.nn.log_sigmoid(sign * jnp.stack(margins)), axis=0)
        for sign in (1, -1)
    )
    return log_p - log_q


@functools.partial(jax.jit, static_argnames="named")
def _decode_nearest_prototype(supports, masks, query, *, named=False):
    logits, out = nearest_prototype(jnp.stack(supports, axis=1), masks, query)
    margin = foreground_margin(logits)
    return (margin, out) if named else margin


def _features_of_photo(
    backbone, weights, images, roles: Sequence[Role] = ROLES, padding=None
):
    del roles
    maps = _backbone_features(backbone, weights, images)
    if padding is None:
        return {"maps": maps, "photo": jnp.ones(maps.shape[:3], bool)}
    return {"maps": maps, "photo": ~padding[:, ::FEATURE_STRIDE, ::FEATURE_STRIDE]}


@functools.partial(jax.jit, static_argnames="named")
def _decode_self_supported(supports, masks, query, *, named=False):
    maps = jnp.stack([support["maps"] for support in supports], axis=1)
    logits, out = self_supported(maps, masks, query["maps"], query["photo"])
    margin = foreground_margin(logits)
    return (margin, out) if named else margin
