"""The released decoder's transformer, after CyCTR (Zhang et al., NeurIPS 2021).

Query cells attend to each other by deformable attention (Zhu et al., ICLR 2021), then
to support tokens, of which those count whose cycle is consistent.
"""

import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from qpenet_jax.core.types import Array
from qpenet_jax.models.ffa import LAYER_NORM_EPSILON
from qpenet_jax.models.layers import linear
from qpenet_jax.models.ops.devices import row_by_row, rows_at_once
from qpenet_jax.models.released.sampling import sample
from qpenet_jax.models.released.tokens import (
    Behaviour,
    Draws,
    Tokens,
    choose,
    draw,
    largest_budget,
)

POINTS = 9
"""The number of places that each head of a query cell attends to."""

LAYERS = 2

MASKED = 1e4
"""Subtracted from the scores of tokens that don't count, in float32."""


class Transformer(nn.Module):
    """Two layers of self-attention, FFN, cross-attention, FFN, each with LayerNorm."""

    heads: int
    ffn_features: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        query_padded: Bool[Array, "b h w"],
        tokens: Float[Array, "b k h w c"],
        foreground: Bool[Array, "b k h w"],
        padded: Bool[Array, "b k h w"],
        behaviour: Behaviour,
        draws: tuple[Draws, ...] | None = None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "b h w c"], dict[str, Array]]:
        """Returns the refined query cells, and every layer's parts by name.

        `tokens` are all support cells; `draws` replaces the random draws, one for each
        layer.
        """
        b, h, w, c = x.shape
        level = self.param("level_embed", nn.initializers.xavier_uniform(), (1, c))
        code = position_code(query_padded, c)
        position = code + level[:, None, None]
        supports = tokens, foreground, padded
        parts: dict[str, Array] = {"pos": code}
        norms = iter(range(4 * LAYERS))
        q = x.reshape(b, h * w, c)

        def norm(t, name):
            i = next(norms)
            parts[f"ln{i}"] = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)(t)
            return parts[f"ln{i}"]

        def dropped(t):
            return nn.Dropout(self.dropout)(t, deterministic=not train)

        def ffn(t, name):
            hidden = nn.relu(linear(self.ffn_features, f"{name}_1")(t))
            return dropped(linear(c, f"{name}_2")(dropped(hidden)))

        for i in range(LAYERS):
            deform = DeformableAttention(self.heads, self.dropout, name=f"deform{i}")
            found = deform(q.reshape(x.shape), position, query_padded, train=train)
            parts[f"deform{i}"] = found = found.reshape(b, h * w, c)
            q = norm(q + dropped(found), f"norm{i}_deform")
            q = norm(q + ffn(q, f"ffn{i}_deform"), f"norm{i}_ffn1")
            if train or i == 0:
                order = draws[i] if draws else None
                rows, chosen = self._tokens(supports, order, behaviour, train=train)
                parts |= {f"tokens{i}": rows, f"token_fg{i}": chosen.foreground}
                parts[f"token_padded{i}"] = chosen.padded
            cross = CycleAttention(
                self.heads, self.dropout, behaviour, name=f"cross{i}"
            )
            parts[f"cross{i}"] = found = cross(q, rows, chosen, train=train)
            q = norm(q + found, f"norm{i}_cross")
            q = norm(q + ffn(q, f"ffn{i}_cross"), f"norm{i}_ffn2")
        return q.reshape(x.shape), parts

    def _tokens(self, supports, draws, behaviour, *, train):
        """Returns the support cells that a layer attends to, and what each one is.

        They are drawn by `draws`, or without these at random in training, else fixed.
        """
        b, shots = supports[0].shape[:2]
        cells, foreground, padded = (t.reshape(b, -1, *t.shape[4:]) for t in supports)
        if draws is None:
            key = self.make_rng("dropout") if train else None
            draws = draw(key, foreground.shape, shots, behaviour)
        slots = min(2 * largest_budget(shots, train=train), cells.shape[1])
        chosen = choose(foreground, padded, draws, slots, behaviour)
        return jnp.take_along_axis(cells, chosen.index[..., None], axis=1), chosen


def position_code(
    padded: Bool[Array, "b h w"], channels: int
) -> Float[Array, "b h w c"]:
    """Returns sines and cosines of row and column, counted from 1 where not padded.

    The first half of the channels is the row's (Carion et al., DETR, ECCV 2020).
    """
    inside = (~padded).astype(jnp.float32)
    quarter = channels // 4
    period = 10000.0 ** (np.arange(quarter, dtype=np.float32) / quarter)
    halves = []
    for axis in (1, 2):
        count = jnp.cumsum(inside, axis=axis)
        last = jax.lax.slice_in_dim(count, count.shape[axis] - 1, None, axis=axis)
        angle = count / (last + 1e-6) * np.float32(2 * math.pi)
        angle = angle[..., None] / period.reshape(1, 1, 1, -1)
        pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        halves.append(pairs.reshape(*angle.shape[:3], -1))
    return jnp.concatenate(halves, axis=-1)


class DeformableAttention(nn.Module):
    """Each head of a query cell attends to nine places that it chooses itself."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        position: Float[Array, "b h w c"],
        padded: Bool[Array, "b h w"],
        *,
        train: bool,
    ) -> Float[Array, "b h w c"]:
        """Returns the attended features; padded cells contribute nothing."""
        b, h, w, c = x.shape
        kept = ~padded
        if train:
            # A cell is dropped for all heads, and what is left isn't scaled up.
            keep = 1 - self.dropout
            kept &= jax.random.bernoulli(self.make_rng("dropout"), keep, kept.shape)
        xavier = nn.initializers.xavier_uniform()
        value = nn.Dense(c, use_bias=False, kernel_init=xavier, name="value")(x)
        value = value * kept[..., None].astype(value.dtype)
        place = x + position
        offsets = nn.Dense(
            self.heads * POINTS * 2,
            kernel_init=nn.initializers.zeros,
            bias_init=_ring,
            name="offsets",
        )(place)
        scores = nn.Dense(
            self.heads * POINTS, kernel_init=nn.initializers.zeros, name="weights"
        )(place)
        weights = nn.softmax(scores.reshape(b, h, w, self.heads, POINTS))
        weights = nn.Dropout(self.dropout)(weights, deterministic=not train)
        found = sample(
            value.reshape(b, h, w, self.heads, -1),
            offsets.reshape(b, h, w, self.heads, POINTS, 2),
            weights,
        )
        out = nn.Dense(c, use_bias=False, kernel_init=xavier, name="out")
        return out(found.reshape(b, h, w, c))


def _ring(key, shape, dtype=jnp.float32):
    """Returns offsets that put point p at distance p, each head in its direction."""
    del key  # nothing is drawn
    heads = shape[0] // (2 * POINTS)
    angle = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    ring = direction[:, None] * np.arange(1, POINTS + 1)[:, None]
    return jnp.asarray(ring.reshape(-1), dtype)


class CycleAttention(nn.Module):
    """Query cells attend to tokens whose best cell's best token is of their kind."""

    heads: int
    dropout: float
    behaviour: Behaviour

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        rows: Float[Array, "b t c"],
        tokens: Tokens,
        *,
        train: bool,
    ) -> Float[Array, "b n c"]:
        """Returns the attended features; if no token is consistent, all count."""
        c = x.shape[-1]

        def heads(t, name):
            split = linear(c, name)(t).reshape(*t.shape[:2], self.heads, -1)
            return split.swapaxes(1, 2)

        q, k, v = heads(x, "query"), heads(rows, "key"), heads(rows, "value")
        shape = (*q.shape[:2], rows.shape[1])
        flags = {n: getattr(tokens, n) for n in ("foreground", "padded", "used")}
        head = {n: jnp.repeat(t, self.heads, axis=0) for n, t in flags.items()}
        q_k_v = {"q": q, "k": k, "v": v}
        head |= {n: jax.lax.collapse(t, 0, 2) for n, t in q_k_v.items()}
        if train:
            cleared = jax.random.bernoulli(
                self.make_rng("dropout"), self.dropout, shape
            )
            head["cleared"] = cleared.reshape(-1, shape[2])
            keys = jax.random.split(self.make_rng("dropout"), math.prod(shape[:2]))
            head["key"] = keys
        attend = functools.partial(
            _attend, behaviour=self.behaviour, dropout=self.dropout
        )

        # One head of one image at a time, or as many of its heads as fit: scores take
        # 35 MB in training, or 138, not 4 GB, and are made again for the gradient.
        policy = jax.checkpoint_policies.save_only_these_names(INCONSISTENT)
        attend = jax.checkpoint(attend, policy=policy)
        at_once = rows_at_once(self.heads, q.shape[2] * rows.shape[1])
        found = row_by_row(attend, head, at_once=at_once, cpu=attend)
        found = found.reshape(q.shape).swapaxes(1, 2).reshape(x.shape)
        found = linear(c, "out")(found)
        return nn.Dropout(self.dropout)(found, deterministic=not train)


def _attend(
    head: Mapping[str, Array], *, behaviour: Behaviour, dropout: float
) -> Float[Array, "n d"]:
    """Returns the features that one head of one image attends to."""
    q, k, v = head["q"], head["k"], head["v"]
    out = head["used"]
    if behaviour == "fixed":
        out = out & ~head["padded"]
    scores = jnp.where(out[None], q @ k.T / math.sqrt(q.shape[1]), -jnp.inf)
    bad = inconsistent(jax.lax.stop_gradient(scores), head["foreground"])
    bad = checkpoint_name(bad, INCONSISTENT)
    if "cleared" in head:
        bad &= ~head["cleared"]
    if behaviour == "released":
        bad = bad | head["padded"]
    weights = nn.softmax(scores - MASKED * bad[None].astype(scores.dtype))
    if "key" in head and dropout:
        weights = drop(head["key"], weights, dropout)
    return weights @ v


INCONSISTENT = "inconsistent"
"""Name of what a head keeps for the gradient; everything else is computed again."""


def drop(key: Array, weights: Float[Array, "n t"], rate: float) -> Float[Array, "n t"]:
    """Drops entries and scales up the others, as dropout does.

    Each entry hashes a random word of its row and one of its column (the finalizer of
    MurmurHash3): a fifth of the cost of a random word for every entry.
    """
    keys = jax.random.split(key)
    rows, columns = (
        jax.random.bits(k, (n,), jnp.uint32)
        for k, n in zip(keys, weights.shape, strict=True)
    )
    word = rows[:, None] ^ columns[None]
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    kept = word ^ (word >> 16) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, weights / (1 - rate), 0)


def inconsistent(
    scores: Float[Array, "n t"], foreground: Bool[Array, " t"]
) -> Bool[Array, " t"]:
    """Returns the tokens that go over their best cell to a token of the other kind."""
    best_cell, best_token = _first_maximum(scores, 0), _first_maximum(scores, 1)
    return foreground[best_token[best_cell]] != foreground


def _first_maximum(scores, axis):
    """Returns argmax, in two passes that XLA's CPU backend runs three times as fast."""
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    largest = scores == scores.max(axis, keepdims=True)
    return jnp.where(largest, place, scores.shape[axis] - 1).min(axis)
