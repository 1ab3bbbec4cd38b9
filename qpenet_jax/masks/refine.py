"""Masks that follow the edges of the photo, by a guided filter.

A network's mask has the detail of its grid, a cell every 8 pixels of its input. Within
some pixels around each place the filter makes the probability a linear function of the
photo's colours, so that it changes where they do.

Sources: He, Sun and Tang, Guided Image Filtering, TPAMI 2013, for photos of colour; He
and Sun, Fast Guided Filter, arXiv:1505.00996: the functions are found in a small photo
and applied to the large one.
"""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from qpenet_jax.core.types import FEATURE_STRIDE

SMOOTHNESS = 1e-4
"""Added to the variance of colours in 0..1: what varies less is no edge. 1e-4 to 1e-2
and radii of half a cell to two were tried, docs/measured.md."""


class Edges:
    """A photo as a guide: `edges(probability)` follows its edges.

    `cell` is the side of a network's cell in pixels of the photo, and the filter's
    radius.
    """

    def __init__(self, photo: UInt8[np.ndarray, "h w 3"], cell: float):
        scale = min(1.0, FEATURE_STRIDE / cell)
        height, width = (max(1, round(n * scale)) for n in photo.shape[:2])
        self.photo, self.size = photo, (width, height)
        self.side = 2 * max(1, round(cell * scale)) + 1
        small = self._small(photo).astype(np.float32) / 255
        self.colours, self.mean = small, self._box(small)
        products = small[..., :, None] * small[..., None, :]
        means = self.mean[..., :, None] * self.mean[..., None, :]
        spread = self._box(products.reshape(height, width, 9)).reshape(means.shape)
        self.spread = spread - means + SMOOTHNESS * np.eye(3, dtype=np.float32)

    def __call__(
        self, probability: Float[np.ndarray, "h w"]
    ) -> Float[np.ndarray, "h w"]:
        """Returns a probability of the photo's size that follows the photo's edges."""
        given = self._small(probability)
        mean = self._box(given)
        common = (
            self._box(self.colours * given[..., None]) - self.mean * mean[..., None]
        )
        slope = np.linalg.solve(self.spread, common[..., None])[..., 0]
        start = mean - (slope * self.mean).sum(-1)
        found = self._large(self._box(start))
        for channel, slopes in enumerate(np.moveaxis(self._box(slope), -1, 0)):
            found += self._large(slopes) * (self.photo[..., channel] / np.float32(255))
        return np.clip(found, 0, 1)

    def _small(self, pixels):
        return cv2.resize(pixels, self.size, interpolation=cv2.INTER_AREA)

    def _large(self, pixels):
        height, width = self.photo.shape[:2]
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)

    def _box(self, pixels):
        """Returns means over squares; of several channels, each by itself."""
        size, border = (self.side, self.side), cv2.BORDER_REFLECT
        means = cv2.boxFilter(pixels, -1, size, borderType=border)
        return means.reshape(pixels.shape)
