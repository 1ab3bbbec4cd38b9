"""What a network's decoder looks at of its supports: what lies around their foreground.

DPE asks which of a support's foreground the query's prototype finds, and FFA attends to
the foreground alone. The rest of a support is never seen, so it need not be segmented
again for every query.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Integer

from qpenet_jax.core.types import Array
from qpenet_jax.models.layers import Convs
from qpenet_jax.models.prototypes import foreground_on_grid

Supports = Sequence[Mapping[str, Array]]

STEP = 8
"""A window's side in cells is a multiple of it: few sizes, as each is compiled once."""


def around_foreground(
    supports: Supports, masks: Integer[np.ndarray, "1 k s s"]
) -> Supports:
    """Cuts K encoded supports [1, h, w, c] to square windows around what is marked.

    A window holds all cells that are at most `Convs.REACH` from the foreground, and
    `M_s` says which are foreground. A support alone stays whole, as do those that have
    one without foreground among them.
    """
    _, height, width, _ = next(iter(supports[0].values())).shape
    grid = height, width
    M_s = np.asarray(foreground_on_grid(masks[0], grid))
    if len(supports) == 1 or not M_s.any(axis=(1, 2)).all():
        return supports
    ranges = [_ranges(np.any(M_s, axis=axis)) for axis in (2, 1)]
    longest = max(int((end - first).max()) for first, end in ranges)
    side = min(-(-longest // STEP) * STEP, *grid)
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
    """Returns from where and to where each of K rows of cells is looked at."""
    first = marked.argmax(axis=1) - Convs.REACH
    end = marked.shape[1] - marked[:, ::-1].argmax(axis=1) + Convs.REACH
    return first, end
