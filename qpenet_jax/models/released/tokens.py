"""Which support cells the decoder attends to, and how each is flagged.

The released transformer attends to a fixed number of support cells, half of them
foreground and half background if there are enough. Upstream draws new ones at every
call.
"""

from typing import Any, Literal, NamedTuple

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


def draw(key: Array, size: tuple[int, int], shots: int, *, train: bool) -> Draws:
    """Draws a layer's tokens for `size` = (episodes, cells of all supports)."""
    scale, *keys = jax.random.split(key, 3)
    low, high = SCALES[shots == 1] if train else (1.0, 1.0)
    factor = jax.random.uniform(scale, (), minval=low, maxval=high)
    budget = jnp.floor(BUDGET * shots * factor).astype(jnp.int32)
    return Draws(budget, *(jax.random.uniform(k, size) for k in keys))


def inference_draws(size: tuple[int, int], shots: int, behaviour: Behaviour) -> Draws:
    """Returns one draw for all episodes, so that a prediction depends on nothing else.

    "fixed" thins evenly; "released" permutes as upstream does, but by one fixed key.
    """
    if behaviour == "fixed":
        return Draws(jnp.array(BUDGET * shots))
    drawn: Any = draw(jax.random.key(INFERENCE_SEED), (1, size[1]), shots, train=False)
    return Draws(drawn.budget, *(jnp.broadcast_to(order, size) for order in drawn[1:]))


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
    centre = jnp.zeros((h, w), bool)
    centre = centre.at[h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].set(True)
    corners = jnp.zeros((h, w), bool)
    corners = corners.at[jnp.array([0, 0, -1, -1]), jnp.array([0, -1, 0, -1])].set(True)
    empty = ~foreground.any((-2, -1), keepdims=True)
    foreground = foreground | (empty & _like(centre, foreground))
    full = foreground.all((-2, -1), keepdims=True)
    return foreground & ~(full & _like(corners, foreground))


def _like(mask, batch):
    return mask.reshape((1,) * (batch.ndim - 2) + mask.shape)


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
    quotas = _quotas(*members, budget)
    take_all = (
        members[0] < budget,
        (members[0] >= budget) & (members[1] < budget),
    )
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
    slot = jnp.arange(slots)[None]
    from_foreground = slot < quotas[0][:, None]
    place = jnp.where(from_foreground, slot, slot - quotas[0][:, None])
    place = place.clip(0, foreground.shape[1] - 1)
    index, read_at = (
        jnp.where(
            from_foreground,
            jnp.take_along_axis(of_foreground, place, axis=1),
            jnp.take_along_axis(of_background, place, axis=1),
        )
        for of_foreground, of_background in zip(*parts, strict=True)
    )
    return Tokens(
        index,
        jnp.take_along_axis(foreground, read_at, axis=1),
        jnp.take_along_axis(padded, read_at, axis=1),
        slot < (quotas[0] + quotas[1])[:, None],
    )


def _quotas(foreground, background, budget):
    """Returns how many tokens each set gives; the other fills up a short one."""
    total = 2 * budget
    few = foreground < budget
    short = ~few & (background < budget)
    from_foreground = jnp.where(few, foreground, jnp.minimum(budget, foreground))
    from_background = jnp.where(few, jnp.minimum(total - foreground, background), 0)
    from_background = jnp.where(few, from_background, jnp.minimum(budget, background))
    from_foreground = jnp.where(
        short, jnp.minimum(total - background, foreground), from_foreground
    )
    return from_foreground, from_background
