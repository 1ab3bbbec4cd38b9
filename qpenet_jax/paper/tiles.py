"""What the sheets of `qpenet figures` show of one run on one episode, tile by tile."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.evaluation.metrics import count_pixels
from qpenet_jax.evaluation.pictures import (
    INK,
    PAPER,
    PREDICTION,
    RGB,
    TILE,
    Colour,
    Mask,
    Scene,
    draw_contour,
    found_mask,
    iou_note,
    overlay,
    tile,
)
from qpenet_jax.evaluation.scoring import unpad
from qpenet_jax.models.ops import interpolation_matrix
from qpenet_jax.models.prototypes import foreground_margin

MAIN, AUX, BACKGROUND = (240, 228, 66), (204, 121, 167), (86, 180, 233)

DARK = 0.35
"""What a heat map leaves of the query's brightness where the map is lowest."""

PURE = 0.75
"""Where between lowest and highest a heat map shows its pure colour."""

FLAT = 1e-6
"""Below this difference of its values a map is that of the zero prototype."""

BAR = 60
"""Length of a colour bar in pixels."""

CONTOUR_SHARE = 100
"""The truth's contour on a prediction: the picture's longer side over its width."""

Out = Mapping[str, Any]
"""QPENet's `out` of one episode as arrays without the batch axis, and `y_bg_clean`."""


def evolution_tiles(
    scene: Scene,
    margin: Float[np.ndarray, "s s"],
    out: Out,
    resize: Resize = "pad",
) -> list[Image.Image]:
    """Returns tiles of y_pre, the support's regions, A_main, A_aux and the prediction.

    A map that the variant lacks is an empty tile.
    """
    pre = _margin_at_size(out["y_pre"], scene.truth, resize) > 0
    heats = (
        heat_tile(scene.query, _at_size(out[name], scene.truth, resize), colour)
        if name in out
        else tile(np.full((TILE, TILE, 3), 255, np.uint8), "not in this variant")
        for name, colour in (("A_main", MAIN), ("A_aux", AUX))
    )
    return [
        _found_tile(scene, pre.astype(np.uint8)),
        _regions_tile(scene, out, resize),
        *heats,
        _found_tile(scene, found_mask(margin, scene.truth, resize)),
    ]


def support_regions(
    scene: Scene, out: Out, resize: Resize = "pad"
) -> tuple[Mask, Mask]:
    """Returns the shown support's main and auxiliary regions (eqs 5 and 6).

    Every pixel of the annotated object is in exactly one of them.
    """
    found = _margin_at_size(out["y_rev"][0], scene.support_mask, resize) > 0
    inside = scene.support_mask == 1
    return (inside & found).astype(np.uint8), (inside & ~found).astype(np.uint8)


def background_tiles(
    scene: Scene, out: Out, resize: Resize = "pad"
) -> list[Image.Image]:
    """Returns the query's background by P_global and by P_bg, with the truth's contour.

    The note tells the background's IoU and how much of the object is lost to it.
    """
    tiles = []
    for name in ("y_bg_q", "y_bg_clean"):
        found = _margin_at_size(out[name], scene.truth, resize) > 0
        both, either, *_ = count_pixels(~found, scene.truth)
        truth = scene.truth == 1
        lost = (found & truth).sum() / max(truth.sum(), 1)
        note = f"IoU {100 * both / max(either, 1):.0f}, lost {100 * lost:.0f} %"
        picture = overlay(scene.query, found.astype(np.uint8), BACKGROUND)
        tiles.append(tile(_with_truth(picture, scene), note))
    return tiles


def _found_tile(scene: Scene, found: Mask) -> Image.Image:
    """Returns a prediction with the truth's contour and the IoU."""
    picture = _with_truth(overlay(scene.query, found, PREDICTION), scene)
    return tile(picture, iou_note(found, scene.truth))


def _with_truth(picture: RGB, scene: Scene) -> RGB:
    return draw_contour(picture, scene.truth, share=CONTOUR_SHARE)


def _regions_tile(scene: Scene, out: Out, resize: Resize) -> Image.Image:
    main, aux = support_regions(scene, out, resize)
    picture = overlay(overlay(scene.support, main, MAIN), aux, AUX)
    share = main.sum() / max(main.sum() + aux.sum(), 1)
    return tile(picture, f"main {100 * share:.0f} %")


def _margin_at_size(logits, like: Mask, resize: Resize) -> Float[np.ndarray, "h w"]:
    return _at_size(foreground_margin(logits), like, resize)


def _at_size(values, like: Mask, resize: Resize) -> Float[np.ndarray, "h w"]:
    """Brings a map on the feature grid to an image, by way of the network's input."""
    height, width = like.shape
    return unpad(at_input_size(values), height, width, resize)


def at_input_size(values: Float[np.ndarray, "h h"]) -> Float[np.ndarray, "s s"]:
    """Stretches a map on the feature grid to the size of the network's input."""
    size = FEATURE_STRIDE * (values.shape[0] - 1) + 1
    stretch = interpolation_matrix(values.shape[0], size)
    return stretch @ values @ stretch.T


# Heat maps.


def heat_tile(
    image: RGB, values: Float[np.ndarray, "h w"], colour: Colour
) -> Image.Image:
    """Returns a map over the darkened query, from its lowest to its highest value."""
    low, high = float(values.min()), float(values.max())
    if high - low < FLAT:
        dark = (DARK * image).astype(np.uint8)
        return tile(dark, f"{low:.2f}: empty region")
    square = tile(heat((values - low) / (high - low), DARK * image, colour))
    _draw_bar(square, colour, f"{low:.2f}", f"{high:.2f}")
    return square


def heat(strength: Float[np.ndarray, "h w"], below: np.ndarray, colour: Colour) -> RGB:
    """Lays the colours of a strength in 0..1 over a picture in 0..255."""
    colours = _colour_map(colour)(strength)
    alpha = colours[..., 3:]
    mixed = alpha * 255 * colours[..., :3] + (1 - alpha) * below
    return mixed.astype(np.uint8)


@functools.cache
def _colour_map(colour: Colour) -> Any:
    """Returns a colour map from transparent at 0 by way of the colour to white at 1."""
    from matplotlib.colors import LinearSegmentedColormap

    pure, white = np.array(colour) / 255, np.array(PAPER) / 255
    stops = [(0.0, (*pure, 0.0)), (PURE, (*pure, 1.0)), (1.0, (*white, 1.0))]
    return LinearSegmentedColormap.from_list("heat", stops)


def _draw_bar(square: Image.Image, colour: Colour, low: str, high: str) -> None:
    """Draws a colour bar between its two ends' values into the corner."""
    draw, font = ImageDraw.Draw(square), ImageFont.load_default(16)
    start = 12 + round(font.getlength(low))
    end = start + BAR + 12 + round(font.getlength(high))
    draw.rectangle((0, 0, end, 25), fill=INK)
    draw.text((6, 5), low, PAPER, font=font)
    draw.text((start + BAR + 6, 5), high, PAPER, font=font)
    strength = np.tile(np.linspace(0, 1, BAR), (12, 1))
    bar = heat(strength, np.zeros(3), colour)
    square.paste(Image.fromarray(bar), (start, 7))
