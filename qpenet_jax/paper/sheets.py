"""The three sheets of `qpenet figures`: rows of episodes, columns of tiles.

First the sheets, then the tiles on them, then the heat maps.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.types import FEATURE_STRIDE
from qpenet_jax.data.transforms import unpad
from qpenet_jax.evaluation.metrics import count_pixels
from qpenet_jax.evaluation.pictures import (
    LEGEND,
    PREDICTION,
    RGB,
    SUPPORT,
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

MAIN, AUX, BACKGROUND = (240, 228, 66), (204, 121, 167), (86, 180, 233)

DARK = 0.35
"""What a heat map leaves of the query's brightness where the map is lowest."""

PURE = 0.75
"""Where between lowest and highest a heat map shows its pure colour."""

FLAT = 1e-6
"""Below this difference of its values a map is that of the zero prototype."""

CONTOUR_SHARE = 100
"""The truth's contour on a prediction: the picture's longer side over its width."""

Maps = Mapping[str, Float[np.ndarray, "s s"]]
"""What a run finds in an episode, at the size of the network's input.

Margins: "prediction", "y_pre", "y_rev" (of the first support), "y_bg_q", "y_bg_clean";
cosines: "A_main", "A_aux". What the run's variant lacks is left out.
"""


class ShownEpisode(NamedTuple):
    """An episode, the margin of the baseline, and the maps of every run by its name."""

    scene: Scene
    cosine: Float[np.ndarray, "s s"]
    runs: Mapping[str, Maps]


class Sheet(NamedTuple):
    """What `evaluation.pictures.sheet` draws."""

    columns: Sequence[str]
    rows: Sequence[Row]
    legend: dict[str, Colour]
    notes: Sequence[str]


def predictions_sheet(shown: Sequence[ShownEpisode], resize: Resize = "pad") -> Sheet:
    """Returns support, query, truth, and the predictions of the baseline and all runs.

    The IoU at the image's own size stands in the corner, in percent.
    """
    rows = []
    for scene, cosine, runs in shown:
        margins = [cosine, *(maps["prediction"] for maps in runs.values())]
        rows.append(prediction_row(scene, margins, resize))
    columns = ("support", "query", "truth", "cosine", *shown[0].runs)
    return Sheet(columns, rows, LEGEND, [])


def evolution_sheet(shown: Sequence[ShownEpisode], resize: Resize = "pad") -> Sheet:
    """Returns a row an episode and run: how its foreground prototypes come about.

    Runs without foreground prototype evolution are named in a note instead.
    """
    names, without = _split_by("y_rev", shown)
    rows = [
        (f"{scene.label}\n{name}", evolution_tiles(scene, runs[name], resize))
        for scene, _, runs in shown
        for name in names
    ]
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
        "A_main, A_aux: cosine to the prototype, from dark at its lowest by way of the "
        "colour to white at its highest"
    )
    missing = (f"{name}: no evolution of the foreground" for name in without)
    return Sheet(columns, rows, legend, [scale, *missing])


def background_sheet(shown: Sequence[ShownEpisode], resize: Resize = "pad") -> Sheet:
    """Returns what each run's background head finds with P_global and with P_bg.

    "lost" is the share of the true object that it calls background. Runs without the
    cleaner (eq 11) are named in a note instead.
    """
    names, without = _split_by("y_bg_clean", shown)
    rows: list[Row] = []
    for scene, _, runs in shown:
        support, _, truth = annotated(scene)
        tiles = [support, truth]
        for name in names:
            tiles += background_tiles(scene, runs[name], resize)
        rows.append((scene.label, tiles))
    titles = (f"{name}: {p}" for name in names for p in ("P_global", "P_bg"))
    legend = {
        "annotated support": SUPPORT,
        "truth": TRUTH,
        "called background": BACKGROUND,
    }
    meaning = "IoU of the background; lost: share of the object called background"
    missing = (f"{name}: no cleaner, P_bg is P_global" for name in without)
    return Sheet(("support", "truth", *titles), rows, legend, [meaning, *missing])


def _split_by(entry: str, shown: Sequence[ShownEpisode]) -> tuple[list[str], list[str]]:
    """Returns the names of the runs that have a map, and of all others."""
    runs = shown[0].runs
    names = [name for name, maps in runs.items() if entry in maps]
    return names, [name for name in runs if name not in names]


# Tiles.


def evolution_tiles(
    scene: Scene, maps: Maps, resize: Resize = "pad"
) -> list[Image.Image]:
    """Returns tiles of y_pre, the support's regions, A_main, A_aux and the prediction.

    A map that the variant lacks is an empty tile.
    """
    main, aux = support_regions(scene, maps, resize)
    regions = overlay(overlay(scene.support, main, MAIN), aux, AUX)
    share = main.sum() / max(main.sum() + aux.sum(), 1)
    heats, (height, width) = [], scene.truth.shape
    for name, colour in (("A_main", MAIN), ("A_aux", AUX)):
        drawn = tile(np.full((TILE, TILE, 3), 255, np.uint8), "not in this variant")
        if name in maps:
            values = unpad(maps[name], height, width, resize)
            drawn = heat_tile(scene.query, values, colour)
        heats.append(drawn)
    predictions = []
    for name in ("y_pre", "prediction"):
        found = found_mask(maps[name], scene.truth, resize)
        note = iou_note(found, scene.truth)
        predictions.append(_outlined(scene, found, PREDICTION, note))
    first, last = predictions
    return [first, tile(regions, f"main {100 * share:.0f} %"), *heats, last]


def support_regions(
    scene: Scene, maps: Maps, resize: Resize = "pad"
) -> tuple[Mask, Mask]:
    """Returns the shown support's main and auxiliary regions (eqs 5 and 6).

    Every pixel of the annotated object is in exactly one of them.
    """
    found = found_mask(maps["y_rev"], scene.support_mask, resize)
    inside = (scene.support_mask == 1).astype(np.uint8)
    return inside & found, inside & (1 - found)


def background_tiles(
    scene: Scene, maps: Maps, resize: Resize = "pad"
) -> list[Image.Image]:
    """Returns the background by P_global and by P_bg, with the truth's contour."""
    tiles = []
    for name in ("y_bg_q", "y_bg_clean"):
        found = found_mask(maps[name], scene.truth, resize)
        note = background_note(found == 1, scene.truth)
        tiles.append(_outlined(scene, found, BACKGROUND, note))
    return tiles


def background_note(found: Bool[np.ndarray, "h w"], truth: Mask) -> str:
    """Returns the IoU of a found background, and the share of the object lost to it."""
    both, either, *_ = count_pixels(~found, truth)
    lost = (found & (truth == 1)).sum() / max((truth == 1).sum(), 1)
    return f"IoU {100 * both / max(either, 1):.0f}, lost {100 * lost:.0f} %"


def _outlined(scene: Scene, found: Mask, colour: Colour, note: str) -> Image.Image:
    """Returns a mask over the query, with the truth's contour and a note."""
    picture = overlay(scene.query, found, colour)
    return tile(draw_contour(picture, scene.truth, TRUTH, CONTOUR_SHARE), note)


# Heat maps.


def at_input_size(values: Float[np.ndarray, "h h"]) -> Float[np.ndarray, "s s"]:
    """Stretches a map on the feature grid to the size of the network's input."""
    size = FEATURE_STRIDE * (values.shape[0] - 1) + 1
    stretch = interpolation_matrix(values.shape[0], size)
    return stretch @ values @ stretch.T


def heat_tile(
    image: RGB, values: Float[np.ndarray, "h w"], colour: Colour
) -> Image.Image:
    """Returns a map over the darkened query, from its lowest to its highest value."""
    low, high = float(values.min()), float(values.max())
    strength = (values - low) / max(high - low, FLAT)
    return tile(heat(strength, DARK * image, colour), f"{low:.2f} to {high:.2f}")


def heat(strength: Float[np.ndarray, "h w"], below: np.ndarray, colour: Colour) -> RGB:
    """Lays a strength in 0..1 over a picture in 0..255.

    It is transparent at 0, the pure colour at PURE and white at 1.
    """
    opacity = np.minimum(strength / PURE, 1)[..., None]
    white = np.maximum((strength - PURE) / (1 - PURE), 0)[..., None]
    shown = (1 - white) * np.array(colour) + white * 255
    return (opacity * shown + (1 - opacity) * below).astype(np.uint8)
