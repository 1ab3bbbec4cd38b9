"""Attention block by block to the keys that count, for XLA's CPU backend."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from qpenet_jax.core.types import Array

KEY_BLOCK = 450
"""Keys whose scores are held at once: for 3600 queries they take 6 MiB, as a cache."""

MASKED = -1e9
"""Score of a position that takes no part."""


def true_keys_first(
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"],
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"], Integer[Array, "b"]]:
    """Returns keys and values, those where `mask` is true in front, and their number.

    Attention doesn't depend on the order of its keys.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)[..., None, None]
    key, value = (jnp.take_along_axis(t, order, axis=1) for t in (key, value))
    return key, value, mask.sum(axis=1)


def attend_in_blocks(
    query: Float[Array, "b q n d"],
    key: Float[Array, "b k n d"],
    value: Float[Array, "b k n d"],
    mask: Bool[Array, "b k"],
) -> Float[Array, "b q n d"]:
    """Attends as `ops.attention` does, in float32.

    The true keys are moved to the front. For each image and head, only the blocks that
    hold true keys are computed: the result is exact, at the cost of the true keys.
    """
    b, _, heads, d = query.shape
    block = min(KEY_BLOCK, mask.shape[1])
    padding = ((0, 0), (0, -mask.shape[1] % block), (0, 0), (0, 0))
    key, value, count = true_keys_first(key, value, mask)

    def by_head(t):
        return t.astype(jnp.float32).swapaxes(1, 2).reshape(b * heads, -1, d)

    out: Any = _attend(
        block,
        by_head(query) / math.sqrt(d),
        by_head(jnp.pad(key, padding)),
        by_head(jnp.pad(value, padding)),
        jnp.repeat(count, heads),
    )
    return out.reshape(b, heads, -1, d).swapaxes(1, 2).astype(query.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, query, key, value, count):
    """Attends with `[n, q, d]` queries to the first `count[n]` of the `[n, k, d]` keys.

    The softmax is accumulated over the blocks and its scores are computed again for the
    gradient, as in FlashAttention (Dao et al., NeurIPS 2022).
    """
    return _attend_fwd(block, query, key, value, count)[0]


def _attend_fwd(block, query, key, value, count):
    def one_head(n, carry):
        outs, log_weights = carry
        q = outs[n]

        def step(i, carry):
            total, largest, weight = carry
            scores = _scores(block, i, q, key[n], count[n])
            new = jnp.maximum(largest, scores.max(axis=1))
            exp, shrink = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
            total = total * shrink[:, None] + exp @ _block(block, i, value[n])
            return total, new, weight * shrink + exp.sum(axis=1)

        zeros = jnp.zeros_like(q[:, 0])
        start = jnp.zeros_like(q), zeros + MASKED, zeros
        blocks = -(-count[n] // block)
        total, largest, weight = jax.lax.fori_loop(0, blocks, step, start)
        outs = outs.at[n].set(total / weight[:, None])
        return outs, log_weights.at[n].set(largest + jnp.log(weight))

    # A head's result takes the place of its query: XLA copies what loops begin with.
    start = query, jnp.zeros(query.shape[:2], query.dtype)
    out, log_weight = jax.lax.fori_loop(0, len(query), one_head, start)
    return out, (query, key, value, count, out, log_weight)


def _attend_bwd(block, residuals, d_out):
    *inputs, count, out, log_weight = residuals
    mean = (out * d_out).sum(axis=2)

    def one_head(n, carry):
        q, k, v = (t[n] for t in carry)

        def step(i, gradients):
            dq, dk, dv = gradients
            exp = jnp.exp(_scores(block, i, q, k, count[n]) - log_weight[n][:, None])
            d_scores = exp * (d_out[n] @ _block(block, i, v).T - mean[n][:, None])
            dq = dq + d_scores @ _block(block, i, k)
            put = jax.lax.dynamic_update_slice_in_dim
            dk = put(dk, d_scores.T @ q, i * block, axis=0)
            return dq, dk, put(dv, exp.T @ d_out[n], i * block, axis=0)

        start = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
        gradients = jax.lax.fori_loop(0, -(-count[n] // block), step, start)
        return tuple(t.at[n].set(g) for t, g in zip(carry, gradients, strict=True))

    gradients = jax.lax.fori_loop(0, len(out), one_head, tuple(inputs))
    return *gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _scores(block, i, query, key, count):
    beyond = i * block + jnp.arange(block) >= count
    return query @ _block(block, i, key).T + jnp.where(beyond, MASKED, 0.0)[None]


def _block(block, i, rows):
    return jax.lax.dynamic_slice_in_dim(rows, i * block, block)
