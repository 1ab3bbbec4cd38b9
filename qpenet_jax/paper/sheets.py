"""The three sheets of `qpenet figures`: rows of episodes, columns of tiles.

First the tiles, then the sheets as tables of them, then the heat maps.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
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


# Tiles.


def found_tile(
    scene: Scene,
    maps: Maps,
    resize: Resize,
    name: str,
    colour: Colour = PREDICTION,
    note: Callable[[Mask, Mask], str] = iou_note,
    contour: bool = True,
) -> Image.Image:
    """Returns where a margin is positive, with a note and the truth's contour."""
    found = found_mask(maps[name], scene.truth, resize)
    picture = overlay(scene.query, found, colour)
    if contour:
        picture = draw_contour(picture, scene.truth, TRUTH, share=100)
    return tile(picture, note(found, scene.truth))


def background_note(found: Mask, truth: Mask) -> str:
    """Returns the IoU of a found background, and the share of the object lost to it."""
    both, either, *_ = count_pixels(found == 0, truth)
    lost = ((found == 1) & (truth == 1)).sum() / max((truth == 1).sum(), 1)
    return f"IoU {100 * both / max(either, 1):.0f}, lost {100 * lost:.0f} %"


def similarity_tile(
    scene: Scene, maps: Maps, resize: Resize, name: str, colour: Colour
) -> Image.Image:
    """Returns a heat map over the query; an empty tile if the variant lacks the map."""
    if name not in maps:
        return tile(np.full((TILE, TILE, 3), 255, np.uint8), "not in this variant")
    height, width = scene.truth.shape
    return heat_tile(scene.query, unpad(maps[name], height, width, resize), colour)


def regions_tile(scene: Scene, maps: Maps, resize: Resize) -> Image.Image:
    """Returns the first support with its main and auxiliary regions (eqs 5 and 6).

    Every pixel of the annotated object is in exactly one of them.
    """
    found = found_mask(maps["y_rev"], scene.support_mask, resize)
    inside = (scene.support_mask == 1).astype(np.uint8)
    main, aux = inside & found, inside & (1 - found)
    share = main.sum() / max(inside.sum(), 1)
    picture = overlay(overlay(scene.support, main, MAIN), aux, AUX)
    return tile(picture, f"main {100 * share:.0f} %")


# Sheets.

background_tile = partial(found_tile, colour=BACKGROUND, note=background_note)


class Sheet(NamedTuple):
    """What is drawn of every run that has the map `needs`.

    `of_episode` are the columns that the runs share; without any, every run has a row
    of its own. `of_run` are the columns of a run, with {} for its name. `note` stands
    at the foot, and `missing` for every run without the map.
    """

    of_episode: tuple[str, ...]
    of_run: Mapping[str, Callable[[Scene, Maps, Resize], Image.Image]]
    legend: dict[str, Colour]
    needs: str = "prediction"
    note: str = ""
    missing: str = ""


SHARED: Sequence[str] = ("support", "query", "truth", "cosine")
"""Columns that the runs share: what was given, and the baseline's prediction."""

SHEETS = {
    "predictions": Sheet(
        SHARED,
        {"{}": partial(found_tile, name="prediction", contour=False)},
        LEGEND,
    ),
    "evolution": Sheet(
        (),
        {
            "query by P_pre (y_pre)": partial(found_tile, name="y_pre"),
            "support: main, aux (y_rev)": regions_tile,
            "A_main": partial(similarity_tile, name="A_main", colour=MAIN),
            "A_aux": partial(similarity_tile, name="A_aux", colour=AUX),
            "prediction": partial(found_tile, name="prediction"),
        },
        {
            "prediction": PREDICTION,
            "truth": TRUTH,
            "main: found by the query's own prototype": MAIN,
            "aux: the rest of the object": AUX,
        },
        "y_rev",
        "A_main, A_aux: cosine to the prototype, from dark at its lowest by way of the "
        "colour to white at its highest",
        "no evolution of the foreground",
    ),
    "background": Sheet(
        ("support", "truth"),
        {
            "{}: P_global": partial(background_tile, name="y_bg_q"),
            "{}: P_bg": partial(background_tile, name="y_bg_clean"),
        },
        {"annotated support": SUPPORT, "truth": TRUTH, "called background": BACKGROUND},
        "y_bg_clean",
        "IoU of the background; lost: share of the object called background",
        "no cleaner, P_bg is P_global",
    ),
}
"""`figures.draw_figures` says what each of them shows of the paper."""


def draw_sheet(
    kind: Sheet,
    shown: Sequence[ShownEpisode],
    resize: Resize = "pad",
    notes: Sequence[str] = (),
) -> tuple[list[str], list[Row], dict[str, Colour], list[str]]:
    """Returns the columns, rows, legend and notes for `evaluation.pictures.sheet`."""
    runs = shown[0].runs
    names = [name for name, maps in runs.items() if kind.needs in maps]
    missing = [f"{name}: {kind.missing}" for name in runs if name not in names]
    notes = [*notes, *([kind.note] if kind.note else []), *missing]
    rows: list[Row] = []
    for scene, cosine, maps in shown:
        tiles = [
            [draw(scene, maps[name], resize) for draw in kind.of_run.values()]
            for name in names
        ]
        if not kind.of_episode:
            labels = (f"{scene.label}\n{name}" for name in names)
            rows += zip(labels, tiles, strict=True)
            continue
        drawn = prediction_row(scene, [cosine], resize)[1]
        shared = dict(zip(SHARED, drawn, strict=True))
        first = [shared[title] for title in kind.of_episode]
        rows.append((scene.label, [*first, *itertools.chain(*tiles)]))
    titled = names if kind.of_episode else [""]
    titles = (title.format(name) for name in titled for title in kind.of_run)
    return [*kind.of_episode, *titles], rows, kind.legend, notes


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
    # Not even 1e-6 apart are the values of the zero prototype's map.
    strength = (values - low) / max(high - low, 1e-6)
    return tile(heat(strength, DARK * image, colour), f"{low:.2f} to {high:.2f}")


def heat(strength: Float[np.ndarray, "h w"], below: np.ndarray, colour: Colour) -> RGB:
    """Lays a strength in 0..1 over a picture in 0..255.

    It is transparent at 0, the pure colour at PURE and white at 1.
    """
    opacity = np.minimum(strength / PURE, 1)[..., None]
    white = np.maximum((strength - PURE) / (1 - PURE), 0)[..., None]
    shown = (1 - white) * np.array(colour) + white * 255
    return (opacity * shown + (1 - opacity) * below).astype(np.uint8)
