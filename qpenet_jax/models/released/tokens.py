"""Which support cells the decoder attends to, and how each is flagged.

The released transformer attends to a fixed number of support cells, half of them
foreground and half background if there are enough. Upstream draws new ones at every
call.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from qpenet_jax.core.types import FEATURE_STRIDE, Array

Behaviour = Literal["released", "fixed"]
"""The authors' code with its defects, or without them: see `docs/released.md`."""

BEHAVIOURS: tuple[Behaviour, ...] = ("released", "fixed")

BUDGET = 300
"""The number of foreground and of background tokens of a support at inference."""

SCALES = {True: (0.6, 4.0), False: (0.6, 1.4)}
"""The range of the factor on the budget in training; True: with one support."""

INFERENCE_SEED = 0
"""Seed of the permutations at inference in "released"; upstream takes random ones."""


class Draws(NamedTuple):
    """The budget of one layer's tokens, and the order in which cells are taken.

    The cells of a set (foreground or background, in raster order) with the smallest
    priorities are taken first; only as many entries count as the set has cells. Without
    priorities a set is thinned evenly, so that nothing is random.
    """

    budget: Int[Array, ""]
    foreground: Float[Array, "b n"] | None = None
    background: Float[Array, "b n"] | None = None


class Tokens(NamedTuple):
    """Indices into all support cells `[b, t]`, and the flags of each token.

    `used` is false for slots that hold no token.
    """

    index: Int[Array, "b t"]
    foreground: Bool[Array, "b t"]
    padded: Bool[Array, "b t"]
    used: Bool[Array, "b t"]


def largest_budget(shots: int, *, train: bool) -> int:
    """Returns the largest number of foreground tokens (and of background tokens)."""
    return int(BUDGET * shots * (SCALES[shots == 1][1] if train else 1))


def draw(
    key: Array | None, size: tuple[int, int], shots: int, behaviour: Behaviour
) -> Draws:
    """Draws a layer's tokens for `size` = (episodes, cells of all supports).

    Training has a key, and everything is random. Without one, all episodes get the same
    draw, so that a prediction depends on nothing else: "fixed" thins evenly; "released"
    permutes as upstream does, but by one fixed key.
    """
    if key is None and behaviour == "fixed":
        return Draws(jnp.array(BUDGET * shots))
    (low, high), count = SCALES[shots == 1], size[0]
    if key is None:
        key, low, high, count = jax.random.key(INFERENCE_SEED), 1.0, 1.0, 1
    scale, *keys = jax.random.split(key, 3)
    factor = jax.random.uniform(scale, (), minval=low, maxval=high)
    budget = jnp.floor(BUDGET * shots * factor).astype(jnp.int32)
    orders = (jax.random.uniform(k, (count, size[1])) for k in keys)
    return Draws(budget, *(jnp.broadcast_to(order, size) for order in orders))


def flags_on_grid(
    mask: Bool[Array, "*b H W"], grid: tuple[int, int], behaviour: Behaviour
) -> Bool[Array, "*b h w"]:
    """Brings a mask of pixels to the feature grid.

    "fixed" takes the pixel that a cell is centred on, as everything else does. Upstream
    takes the "nearest" one by another rule, up to 7 pixels away.
    """
    if behaviour == "fixed":
        return mask[..., ::FEATURE_STRIDE, ::FEATURE_STRIDE]
    rows, columns = (
        np.arange(cells) * side // cells
        for side, cells in zip(mask.shape[-2:], grid, strict=True)
    )
    return mask[..., rows[:, None], columns]


def never_one_sided(foreground: Bool[Array, "*b h w"]) -> Bool[Array, "*b h w"]:
    """Marks 2 x 2 central cells of an empty support, unmarks corners of a full one."""
    h, w = foreground.shape[-2:]
    centre, corners = np.zeros((2, *[1] * (foreground.ndim - 2), h, w), bool)
    centre[..., h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1] = True
    corners[..., [0, 0, -1, -1], [0, -1, 0, -1]] = True
    foreground |= ~foreground.any((-2, -1), keepdims=True) & centre
    return foreground & ~(foreground.all((-2, -1), keepdims=True) & corners)


def choose(
    foreground: Bool[Array, "b n"],
    padded: Bool[Array, "b n"],
    draws: Draws,
    slots: int,
    behaviour: Behaviour,
) -> Tokens:
    """Chooses at most `slots` tokens: foreground first, background second."""
    budget = draws.budget
    members = foreground.sum(axis=1), (~foreground).sum(axis=1)
    # The other set fills up a short one.
    quotas = (
        jnp.minimum(members[0], jnp.maximum(budget, 2 * budget - members[1])),
        jnp.minimum(members[1], jnp.maximum(budget, 2 * budget - members[0])),
    )
    few = members[0] < budget
    take_all = few, ~few & (members[1] < budget)
    parts = []
    for i, inside in enumerate((foreground, ~foreground)):
        compact = jnp.argsort(~inside, axis=1, stable=True)
        rank = jnp.arange(inside.shape[1])[None]
        count, quota = members[i][:, None], quotas[i][:, None]
        given = (draws.foreground, draws.background)[i]
        if given is None:
            kept = (rank + 1) * quota // count.clip(1) > rank * quota // count.clip(1)
            priority = jnp.where(kept, 0.0, 1.0)
        else:
            priority = jnp.where(take_all[i][:, None], 0.0, given)
        priority = jnp.where(rank < count, priority, jnp.inf)
        order = jnp.argsort(priority, axis=1, stable=True)
        index = jnp.take_along_axis(compact, order, axis=1)
        # Upstream reads the flags of tokens that it draws at the place in the list of
        # the set, as if that were a cell.
        wrong = (behaviour == "released") & ~take_all[i][:, None]
        parts.append((index, jnp.where(wrong, order, index)))
    # Slot t holds the t-th foreground token, or else the background's.
    slot, quota, n = jnp.arange(slots)[None], quotas[0][:, None], foreground.shape[1]
    place = jnp.where(slot < quota, slot, n + (slot - quota).clip(max=n - 1))
    index, read_at = (
        jnp.take_along_axis(jnp.concatenate(lists, axis=1), place, axis=1)
        for lists in zip(*parts, strict=True)
    )
    return Tokens(
        index,
        jnp.take_along_axis(foreground, read_at, axis=1),
        jnp.take_along_axis(padded, read_at, axis=1),
        slot < (quotas[0] + quotas[1])[:, None],
    )
