"""`qpenet figures`: what QPENet's parts do on chosen episodes (paper, Figs 4-6)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.episodes import EpisodeIds, load_episode
from qpenet_jax.data.transforms import Resize
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
    found_mask,
    iou_note,
    outline,
    overlay,
    prediction_row,
    read_scene,
    sheet,
    tile,
)
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.scoring import unpad
from qpenet_jax.models.ops import interpolation_matrix
from qpenet_jax.models.prototypes import STRIDE
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.runs.folder import INPUTS_FILE, open_run, read_json
from qpenet_jax.training.step import episode_features

MAIN, AUX, BACKGROUND = (240, 228, 66), (204, 121, 167), (86, 180, 233)

DARK = 0.35
"""What a heat map leaves of the query's brightness where the map is lowest."""

KNEE = 0.75
"""Where between lowest and highest a heat map shows its pure colour."""

FLAT = 1e-6
"""Below this difference of its values a map is that of the zero prototype."""

BAR = 60
"""Length of a colour bar in pixels."""

MAX_ROWS = 200
"""A JPEG is at most 65,535 pixels high, a row of a sheet takes 232."""

QUALITY = 92

Out = Mapping[str, Any]
"""QPENet's `out` of one episode as arrays without the batch axis, and `y_bg_clean`."""


class Run(NamedTuple):
    """A trained network under the name that the sheets give it."""

    name: str
    experiment: Experiment
    params: PyTree[Array]
    weights: PyTree[Array]


class Seen(NamedTuple):
    """An episode, and what the baseline and every run make of it."""

    scene: Scene
    cosine: Float[np.ndarray, "s s"]
    runs: Mapping[str, tuple[Float[np.ndarray, "s s"], Out]]


def figures(
    workdirs: Mapping[str, Path] | Sequence[Path],
    out: Path,
    *,
    episodes: Sequence[int] | None = None,
    count: int = 6,
    seed: int = 0,
    shots: int = 1,
) -> list[Path]:
    """Write three sheets about trained runs into `out` and return their paths.

    `predictions.jpg` compares the runs and the cosine baseline (as Figs 4 and 5),
    `evolution.jpg` shows how the foreground prototypes come about (eqs 2-8, 13, 14),
    `background.jpg` what is background by P_global and by P_bg (as Fig. 6). The
    episodes are those of the first run's protocol, first seed: the indices `episodes`,
    or `count` of them drawn by `seed`. Runs are called by the mapping's keys, or by
    their variant where that tells them apart, or by their folder.

    Raises:
        InputError: a folder without a run; runs of different images, classes or sizes;
            an episode beyond the protocol; `out` can't be written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another for the figures")
    runs = _open_runs(workdirs)
    experiment = runs[0].experiment
    protocol = experiment.protocol(shots=shots)
    indices = _indices(protocol, episodes, count, seed)
    if len(indices) * len(runs) > MAX_ROWS:
        raise InputError(
            f"{len(indices)} episodes of {len(runs)} run(s) make a sheet of more than "
            f"{MAX_ROWS} rows: choose fewer"
        )
    val = experiment.dataset("val")
    sampler = experiment.eval_samplers(val, protocol)[0]
    seen = _look_at(runs, val, [sampler(i) for i in indices], protocol)
    notes = _notes(protocol)
    pages = {
        "predictions": predictions_sheet(seen, notes, protocol.resize),
        "evolution": evolution_sheet(seen, notes, protocol.resize),
        "background": background_sheet(seen, notes, protocol.resize),
    }
    files = {out / f"{name}.jpg": _jpeg(page) for name, page in pages.items()}
    for path, content in files.items():
        write_whole(path, content)
    return list(files)


def predictions_sheet(
    seen: Sequence[Seen], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
    """Return support, query, truth, and the predictions of the baseline and all runs.

    The IoU at the image's own size stands in the corner, in percent.
    """
    rows = []
    for scene, cosine, runs in seen:
        margins = [cosine, *(margin for margin, _ in runs.values())]
        rows.append(prediction_row(scene, margins, resize))
    columns = ("support", "query", "truth", "cosine", *seen[0].runs)
    return sheet(columns, rows, LEGEND, notes)


def evolution_sheet(
    seen: Sequence[Seen], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
    """Return a row an episode and run: how its foreground prototypes come about.

    Runs without foreground prototype evolution are named in a note instead.
    """
    rows = []
    for scene, _, runs in seen:
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
        "main: what the query asks for": MAIN,
        "aux: the rest of the object": AUX,
    }
    without = _without(seen, "y_rev")
    told = "A_main, A_aux: cosine to the prototype, each from its lowest to its highest"
    notes = [*notes, told, *(f"{n}: no evolution of the foreground" for n in without)]
    return sheet(columns, rows, legend, notes)


def background_sheet(
    seen: Sequence[Seen], notes: Sequence[str], resize: Resize = "pad"
) -> RGB:
    """Return what each run's background head finds with P_global and with P_bg.

    "lost" is the share of the true object that it calls background. Runs without the
    cleaner (eq 11) are named in a note instead.
    """
    without = _without(seen, "y_bg_clean")
    names = [name for name in seen[0].runs if name not in without]
    rows: list[Row] = []
    for scene, _, runs in seen:
        support, _, truth = annotated(scene)
        found = (background_tiles(scene, runs[name][1], resize) for name in names)
        rows.append(
            (scene.label, [support, truth, *(t for pair in found for t in pair)])
        )
    prefix = {name: f"{name}: " if len(seen[0].runs) > 1 else "" for name in names}
    titles = (f"{prefix[name]}{p}" for name in names for p in ("P_global", "P_bg"))
    columns = ("support", "truth", *titles)
    legend = {k: v for k, v in LEGEND.items() if k != "prediction"}
    legend["called background"] = BACKGROUND
    told = "IoU of the background; lost: share of the object called background"
    notes = [*notes, told, *(f"{n}: no cleaner, P_bg is P_global" for n in without)]
    return sheet(columns, rows, legend, notes)


def evolution_tiles(
    scene: Scene,
    margin: Float[np.ndarray, "s s"],
    out: Out,
    resize: Resize = "pad",
) -> list[Image.Image]:
    """Return tiles of y_pre, the support's regions, A_main, A_aux and the prediction.

    A map that the variant lacks is an empty tile.
    """
    pre = _at_size(_lead(out["y_pre"]), scene.truth, resize) > 0
    maps = (("A_main", MAIN), ("A_aux", AUX))
    heats = (
        _heat_tile(scene.query, _at_size(out[name], scene.truth, resize), colour)
        if name in out
        else tile(np.full((TILE, TILE, 3), 255, np.uint8), "not in this variant")
        for name, colour in maps
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
    """Return the shown support's main and auxiliary regions (eqs 5 and 6).

    They share out the annotated object: no pixel of it is in both or in neither.
    """
    found = _at_size(_lead(out["y_rev"][0]), scene.support_mask, resize) > 0
    inside = scene.support_mask == 1
    return (inside & found).astype(np.uint8), (inside & ~found).astype(np.uint8)


def background_tiles(
    scene: Scene, out: Out, resize: Resize = "pad"
) -> list[Image.Image]:
    """Return the query's background by P_global and by P_bg, with the truth's outline.

    The note tells the background's IoU and how much of the object is lost to it.
    """
    tiles = []
    for name in ("y_bg_q", "y_bg_clean"):
        found = _at_size(_lead(out[name]), scene.truth, resize) > 0
        both, either, *_ = count_pixels(~found, scene.truth)
        truth = scene.truth == 1
        lost = (found & truth).sum() / max(truth.sum(), 1)
        note = f"IoU {100 * both / max(either, 1):.0f}, lost {100 * lost:.0f} %"
        picture = overlay(scene.query, found.astype(np.uint8), BACKGROUND)
        tiles.append(tile(outline(picture, scene.truth, share=100), note))
    return tiles


def _found_tile(scene, found):
    """Return a prediction with the truth's outline and the IoU."""
    picture = overlay(scene.query, found, PREDICTION)
    picture = outline(picture, scene.truth, share=100)
    return tile(picture, iou_note(found, scene.truth))


def _regions_tile(scene, out, resize):
    main, aux = support_regions(scene, out, resize)
    picture = overlay(overlay(scene.support, main, MAIN), aux, AUX)
    share = main.sum() / max(main.sum() + aux.sum(), 1)
    return tile(picture, f"main {100 * share:.0f} %")


def _heat_tile(image: RGB, values: Float[np.ndarray, "h w"], colour: Colour):
    """Return a map over the darkened query, from its lowest to its highest value."""
    low, high = float(values.min()), float(values.max())
    if high - low < FLAT:
        dark = (DARK * image).astype(np.uint8)
        return tile(dark, f"{low:.2f}: empty region")
    heat = _ramp((values - low) / (high - low), DARK * image, colour)
    square = tile(heat)
    _draw_bar(square, colour, f"{low:.2f}", f"{high:.2f}")
    return square


def _ramp(strength, dark, colour) -> RGB:
    """Go from `dark` at 0 by way of the colour to white at 1."""
    s = np.asarray(strength)[..., None]
    lower, upper = np.clip(s / KNEE, 0, 1), np.clip((s - KNEE) / (1 - KNEE), 0, 1)
    mixed = (1 - lower) * dark + lower * np.array(colour)
    return ((1 - upper) * mixed + upper * np.array(PAPER)).astype(np.uint8)


def _draw_bar(square, colour, low, high):
    """Draw a colour bar between its two ends' values into the corner."""
    draw, font = ImageDraw.Draw(square), ImageFont.load_default(16)
    start = 12 + round(font.getlength(low))
    end = start + BAR + 12 + round(font.getlength(high))
    draw.rectangle((0, 0, end, 25), fill=INK)
    draw.text((6, 5), low, PAPER, font=font)
    draw.text((start + BAR + 6, 5), high, PAPER, font=font)
    strength = np.tile(np.linspace(0, 1, BAR), (12, 1))
    square.paste(Image.fromarray(_ramp(strength, np.zeros(3), colour)), (start, 7))


def _lead(logits):
    return logits[..., 1] - logits[..., 0]


def _at_size(values, like, resize):
    """Bring a map on the feature grid to an image, by way of the network's input."""
    side = STRIDE * (values.shape[0] - 1) + 1
    stretch = interpolation_matrix(values.shape[0], side)
    height, width = like.shape
    return unpad(stretch @ values @ stretch.T, height, width, resize)


def _without(seen, entry):
    """Return the runs whose `out` lacks an entry."""
    return [name for name, (_, out) in seen[0].runs.items() if entry not in out]


def _notes(protocol: Protocol) -> list[str]:
    notes = [
        f"{protocol.dataset}, fold {protocol.fold}: novel classes, {protocol.shots}-"
        f"shot, seed {protocol.seeds[0]}; # is the episode's index, IoU in percent at "
        "the image's size"
    ]
    if protocol.shots > 1:
        notes.append(f"of {protocol.shots} supports the first is shown")
    return notes


def _look_at(
    runs: Sequence[Run],
    val: SegmentationDataset,
    chosen: Sequence[EpisodeIds],
    protocol: Protocol,
) -> list[Seen]:
    cosine = runs[0].experiment.cosine_predictor(runs[0].weights)
    looks = {run.name: _look(run) for run in runs}
    seen = []
    for ids in chosen:
        loaded = load_episode(val, ids, protocol.side, resize=protocol.resize)
        episode = Episode(*(x[None] for x in loaded))
        seen.append(
            Seen(
                read_scene(val, ids),
                np.asarray(cosine(episode))[0],
                {name: look(episode) for name, look in looks.items()},
            )
        )
    return seen


def _look(run: Run) -> Callable[[Episode], tuple[Float[np.ndarray, "s s"], Out]]:
    """Return `look(batch of one)`: the foreground's lead and the network's `Out`."""
    model, backbone = run.experiment.model, run.experiment.backbone

    @jax.jit
    def forward(params, weights, batch):
        supports, query = episode_features(backbone, weights, batch)

        def apply(params) -> Any:
            variables = {"params": params}
            return model.apply(variables, supports, batch.support_masks, query)

        logits, out = apply(params)
        if model.bgpe:
            # The head of eq 10 segments by whatever stands at P_global's place.
            gbc = params["gbc"] | {"P_global": out["P_bg"][0]}
            out["y_bg_clean"] = apply(params | {"gbc": gbc})[1]["y_bg_q"]
        return logits[..., 1] - logits[..., 0], out

    def look(batch):
        seen = forward(run.params, run.weights, batch)
        return jax.tree.map(lambda x: np.asarray(x[0]), seen)

    return look


def _indices(
    protocol: Protocol, episodes: Sequence[int] | None, count: int, seed: int
) -> list[int]:
    """Return the chosen episodes, or `count` different ones drawn by `seed`."""
    total = protocol.episodes
    if episodes is not None:
        if not len(episodes):
            raise InputError("no episode is chosen: give their indices, or a count")
        for i in episodes:
            if not 0 <= i < total:
                raise InputError(
                    f"episode {i}: the protocol has episodes 0 to {total - 1}"
                )
        return list(episodes)
    if not 1 <= count <= total or seed < 0:
        raise InputError(
            f"{count} episodes drawn by seed {seed}: give 1 to {total}, as many as the "
            "protocol has, and a seed from 0 on"
        )
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    return sorted(chosen.tolist())


def _open_runs(workdirs: Mapping[str, Path] | Sequence[Path]) -> list[Run]:
    """Open runs that can be shown side by side, under names that tell them apart."""
    if not workdirs:
        raise InputError("no run is given: name the --workdir of train.py")
    named = isinstance(workdirs, Mapping)
    folders = [Path(w) for w in (workdirs.values() if named else workdirs)]
    opened = [open_run(folder) for folder in folders]
    names = list(workdirs) if named else _names(folders, [e for e, *_ in opened])
    _check_comparable(folders, [e for e, *_ in opened])
    return [
        Run(str(name), experiment, params, experiment.backbone_weights())
        for name, (experiment, params, _) in zip(names, opened, strict=True)
    ]


def _names(folders: Sequence[Path], experiments: Sequence[Experiment]) -> list[str]:
    variants = [experiment.config.variant for experiment in experiments]
    for names in (variants, [f.resolve().name for f in folders], map(str, folders)):
        names = list(names)
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{folders[0]} and the others: give every run once")


def _check_comparable(
    folders: Sequence[Path], experiments: Sequence[Experiment]
) -> None:
    """Refuse runs that an episode of the first would show something else."""
    facts = [
        _facts(folder, experiment)
        for folder, experiment in zip(folders, experiments, strict=True)
    ]
    for folder, other in zip(folders, facts, strict=True):
        for name, value in facts[0].items():
            if other[name] != value:
                raise InputError(
                    f"{folder} has other {name} than {folders[0]}: figures compare "
                    "runs of one data set, fold and input size"
                )


def _facts(folder: Path, experiment: Experiment) -> dict[str, Any]:
    protocol = experiment.protocol()
    path = folder / INPUTS_FILE
    inputs = read_json(path) if path.exists() else {}
    return {
        "novel classes": protocol.classes,
        "input size": (protocol.side, protocol.resize),
        "validation images": inputs.get("validation images"),
    }


def _jpeg(page: RGB) -> bytes:
    """Encode without thinning out the colours, which would blur text and outlines."""
    content = io.BytesIO()
    Image.fromarray(page).save(content, "JPEG", quality=QUALITY, subsampling=0)
    return content.getvalue()
