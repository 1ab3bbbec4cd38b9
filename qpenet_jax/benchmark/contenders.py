"""The two that compete in one case: the same inputs, and results that must be equal."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from qpenet_jax.benchmark.made_up import made_up_photo
from qpenet_jax.benchmark.settings import Case
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.transforms import fit, fit_label


class Contender(NamedTuple):
    """One of the two, JAX or PyTorch, in one case.

    `first` does a step and returns the numbers that must be equal for both; `call`
    does a step and returns when it is finished.
    """

    first: Callable[[], dict[str, np.ndarray]]
    call: Callable[[], Any]


# --- inputs -----------------------------------------------------------------------

SHARES = (0.02, 0.4)
"""How much of a photo its object covers: in VOC, padded, the middle 80 % of objects of
2,048 pixels or more cover 2 to 41 %. The cost of attention depends on it."""


def made_up_episodes(case: Case) -> Episode:
    """Returns the case's batch of episodes; the images are photos of noise."""
    rng = np.random.default_rng(case.seed)
    drawn = [_photo(i, case.size, rng) for i in range(case.images)]
    images, masks = map(np.stack, zip(*drawn, strict=True))
    shape = case.batch, case.shots + 1
    images, masks = (x.reshape(*shape, *x.shape[1:]) for x in (images, masks))
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:])


def _photo(
    index: int, side: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Returns a photo with a tinted ellipse, and the mask of the ellipse."""
    image, label = made_up_photo(index)
    height, width = label.shape
    scale = math.sqrt(rng.uniform(*SHARES) / math.pi)  # of the half axes
    axes = round(scale * width), round(scale * height)
    centre = (
        int(rng.integers(axes[0], width - axes[0])),
        int(rng.integers(axes[1], height - axes[1])),
    )
    mask = np.zeros_like(label)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, cv2.FILLED)
    image[mask == 1] = image[mask == 1] // 2 + rng.integers(0, 128, 3).astype(np.uint8)
    return fit(image, side), fit_label(mask, side)


# --- are the results equal? -------------------------------------------------------

TIE = {"float32": 1e-3, "tf32": 0.03, "bfloat16": 0.03}
"""A pixel whose margin is below this share of the largest may be of either class."""

LIMITS = {  # in float32, and in the others, whose numbers have 8 or 11 bits
    "margin": (1e-3, 0.2),
    "masks": (1e-3, 0.01),
    "features": (1e-3, 0.2),
    "loss": (1e-4, 0.02),
    "gradient": (0.01, 0.5),
}
"""The largest differences at which speed is still compared."""


def differences_between(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], case: Case
) -> dict[str, float]:
    """Returns how far the results differ; refuse a comparison of different things.

    Differences are relative: of margins, features and loss to the largest, of gradients
    to their norm. "masks" is the share of pixels, without ties, of another class.

    Raises:
        InputError: naming what differs.
    """
    found = {name: _difference(name, ours[name], theirs[name]) for name in theirs}
    if "margin" in theirs:
        tie = TIE[case.dtype] * np.abs(theirs["margin"]).max()
        clear = np.abs(theirs["margin"]) > tie
        differs = (ours["margin"] > 0) != (theirs["margin"] > 0)
        found["masks"] = float(differs[clear].mean())
    for name, value in found.items():
        limit = LIMITS[name][case.dtype != "float32"]
        if not value <= limit:  # NaN is refused, too
            raise InputError(
                f"{case}: {name} of JAX and PyTorch differ by {value:.2g}, more than "
                f"{limit:g}, so their speed can't be compared: measure without "
                "--against"
            )
    return found


def _difference(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    difference = found - expected
    if name == "gradient":
        return float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return float(np.abs(difference).max() / np.abs(expected).max())
