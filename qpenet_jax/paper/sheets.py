"""The three sheets of `qpenet figures`: rows of episodes, columns of tiles."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qpenet_jax.core.choices import Resize
from qpenet_jax.evaluation.pictures import (
    LEGEND,
    PREDICTION,
    RGB,
    TRUTH,
    Row,
    Scene,
    annotated,
    prediction_row,
    sheet,
)
from qpenet_jax.paper.tiles import (
    AUX,
    BACKGROUND,
    MAIN,
    Out,
    background_tiles,
    evolution_tiles,
)


class ShownEpisode(NamedTuple):
    """An episode, and what the baseline and every run predict for it.

    `runs` holds the margin and the network's `Out` by the run's name.
    """

    scene: Scene
    cosine: Float[np.ndarray, "s s"]
    runs: Mapping[str, tuple[Float[np.ndarray, "s s"], Out]]


def predictions_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
    """Returns support, query, truth, and the predictions of the baseline and all runs.

    The IoU at the image's own size stands in the corner, in percent.
    """
    rows = []
    for scene, cosine, runs in shown:
        margins = [cosine, *(margin for margin, _ in runs.values())]
        rows.append(prediction_row(scene, margins, resize))
    columns = ("support", "query", "truth", "cosine", *shown[0].runs)
    return sheet(columns, rows, LEGEND, notes)


def evolution_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
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
    return sheet(columns, rows, legend, [*notes, scale, *missing])


def background_sheet(
    shown: Sequence[ShownEpisode], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
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
    return sheet(columns, rows, legend, [*notes, meaning, *missing])


def _runs_without(entry: str, shown: Sequence[ShownEpisode]) -> list[str]:
    """Returns the runs whose `out` lacks an entry."""
    return [name for name, (_, out) in shown[0].runs.items() if entry not in out]
