"""An object found around a click or a line, by its colours and the edges of the photo.

Source: Rother, Kolmogorov and Blake, GrabCut, SIGGRAPH 2004, as OpenCV has it.
"""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from qpenet_jax.data.transforms import nearest

SIDE = 240
"""The picture is looked at so small: larger ones take seconds and find no more."""

NEAR, FAR = 0.06, 0.2
"""How far from what was touched the object is looked for at first, as a share of the
longer side: a click reaches far, a broad line covers most of the object by itself."""

BEYOND = 3
"""From so many times that distance on, everything is background."""

ROUNDS = 3


def object_around(
    picture: UInt8[np.ndarray, "h w 3"], touched: Bool[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Returns the object of which some pixels were touched; those belong to it.

    One thing that hangs together, or several if several were touched. It is a help for
    marking, no more: it knows colours, not objects.
    """
    if not touched.any():
        return touched
    height, width = touched.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    # By area: a thin line must not fall between the pixels.
    seeds = cv2.resize(touched.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    found = _cut(small, seeds > 0)
    _, parts = cv2.connectedComponents(found.astype(np.uint8))
    found = found & np.isin(parts, np.unique(parts[seeds > 0]))
    return (nearest(found.astype(np.uint8), width, height) == 1) | touched


def _cut(picture, seeds):
    """Returns GrabCut's foreground; what is likely at first depends on the seeds."""
    longest = max(seeds.shape)
    share = np.clip(FAR - np.sqrt(seeds.sum()) / longest, NEAR, FAR)
    reach = max(2, round(share * longest))
    likely = np.full(seeds.shape, cv2.GC_BGD, np.uint8)
    likely[_within(seeds, BEYOND * reach)] = cv2.GC_PR_BGD
    likely[_within(seeds, reach)] = cv2.GC_PR_FGD
    likely[seeds] = cv2.GC_FGD
    if not (likely != cv2.GC_FGD).any() or min(seeds.shape) < 3:
        return seeds
    cv2.setRNGSeed(0)  # the same click finds the same
    models = np.zeros((1, 65)), np.zeros((1, 65))
    if not np.isin(likely, (cv2.GC_BGD, cv2.GC_PR_BGD)).any():
        likely[:, [0, -1]] = likely[[0, -1]] = cv2.GC_PR_BGD  # it needs some
        likely[seeds] = cv2.GC_FGD
    mode = cv2.GC_INIT_WITH_MASK
    cv2.grabCut(picture, likely, (0, 0, 1, 1), *models, ROUNDS, mode)
    return np.isin(likely, (cv2.GC_FGD, cv2.GC_PR_FGD))


def _within(seeds, pixels: int):
    """Returns what lies within some pixels of the seeds."""
    away = cv2.distanceTransform((~seeds).astype(np.uint8), cv2.DIST_L2, 5)
    return away <= pixels
