"""The three sheets of `qpenet figures`: rows of episodes, columns of tiles.

First the sheets, then the tiles on them, then the heat maps.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.transforms import unpad
from qpenet_jax.evaluation.metrics import count_pixels
from qpenet_jax.evaluation.pictures import (
    INK,
    LEGEND,
    PAPER,
    PREDICTION,
    RGB,
    TILE,
    TRUTH,
    Colour,
    Mask,
    Row,
    Scene,
    annotated,
    draw_contour,
    found_mask,
    iou_note,
    overlay,
    prediction_row,
    tile,
)
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


class ShownEpisode(NamedTuple):
    """An episode, and what the baseline and every run predict for it.

    `runs` holds the margin and the network's `Out` by the run's name.
    """

    scene: Scene
    cosine: Float[np.ndarray, "s s"]
    runs: Mapping[str, tuple[Float[np.ndarray, "s s"], Out]]


class Sheet(NamedTuple):
    """What `evaluation.pictures.sheet` draws."""

    columns: Sequence[str]
    rows: Sequence[Row]
    legend: dict[str, Colour]
    notes: Sequence[str]


def predictions_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> Sheet:
    """Returns support, query, truth, and the predictions of the baseline and all runs.

    The IoU at the image's own size stands in the corner, in percent.
    """
    rows = []
    for scene, cosine, runs in shown:
        margins = [cosine, *(margin for margin, _ in runs.values())]
        rows.append(prediction_row(scene, margins, resize))
    columns = ("support", "query", "truth", "cosine", *shown[0].runs)
    return Sheet(columns, rows, LEGEND, notes)


def evolution_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> Sheet:
    """Returns a row an episode and run: how its foreground prototypes come about.

    Runs without foreground prototype evolution are named in a note instead.
    """
    rows = []
    for scene, _, runs in shown:
        for name, (margin, out) in runs.items():
            if "y_rev" in out:
                label = scene.label if len(runs) == 1 else f"{scene.label}\n{name}"
                tiles = evolution_tiles(scene, margin, out, resize)
                rows.append((label, tiles))
    columns = (
        "query by P_pre (y_pre)",
        "support: main, aux (y_rev)",
        "A_main",
        "A_aux",
        "prediction",
    )
    legend = {
        "prediction": PREDICTION,
        "truth": TRUTH,
        "main: found by the query's own prototype": MAIN,
        "aux: the rest of the object": AUX,
    }
    scale = (
        "A_main, A_aux: cosine to the prototype, each from its lowest to its highest"
    )
    without = _runs_without("y_rev", shown)
    missing = (f"{name}: no evolution of the foreground" for name in without)
    return Sheet(columns, rows, legend, [*notes, scale, *missing])


def background_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> Sheet:
    """Returns what each run's background head finds with P_global and with P_bg.

    "lost" is the share of the true object that it calls background. Runs without the
    cleaner (eq 11) are named in a note instead.
    """
    without = _runs_without("y_bg_clean", shown)
    names = [name for name in shown[0].runs if name not in without]
    rows: list[Row] = []
    for scene, _, runs in shown:
        support, _, truth = annotated(scene)
        found = (background_tiles(scene, runs[name][1], resize) for name in names)
        tiles = [support, truth, *(tile for pair in found for tile in pair)]
        rows.append((scene.label, tiles))
    prefix = {name: f"{name}: " if len(shown[0].runs) > 1 else "" for name in names}
    titles = (f"{prefix[name]}{p}" for name in names for p in ("P_global", "P_bg"))
    legend = {k: v for k, v in LEGEND.items() if k != "prediction"}
    legend["called background"] = BACKGROUND
    meaning = "IoU of the background; lost: share of the object called background"
    missing = (f"{name}: no cleaner, P_bg is P_global" for name in without)
    columns = ("support", "truth", *titles)
    return Sheet(columns, rows, legend, [*notes, meaning, *missing])


def _runs_without(entry: str, shown: Sequence[ShownEpisode]) -> list[str]:
    """Returns the runs whose `out` lacks an entry."""
    return [name for name, (_, out) in shown[0].runs.items() if entry not in out]


# Tiles.


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
    """Returns the background by P_global and by P_bg, with the truth's contour."""
    tiles = []
    for name in ("y_bg_q", "y_bg_clean"):
        found = _margin_at_size(out[name], scene.truth, resize) > 0
        picture = overlay(scene.query, found.astype(np.uint8), BACKGROUND)
        note = background_note(found, scene.truth)
        tiles.append(tile(_with_truth(picture, scene), note))
    return tiles


def background_note(found: Bool[np.ndarray, "h w"], truth: Mask) -> str:
    """Returns the IoU of a found background, and the share of the object lost to it."""
    both, either, *_ = count_pixels(~found, truth)
    lost = (found & (truth == 1)).sum() / max((truth == 1).sum(), 1)
    return f"IoU {100 * both / max(either, 1):.0f}, lost {100 * lost:.0f} %"


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
