"""`qpenet figures`: what QPENet's parts do on chosen episodes (paper, Figs 4-6)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.evaluation.pictures import RGB, load_batch_of_one, read_scene, sheet
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.paper.sheets import (
    Out,
    ShownEpisode,
    background_sheet,
    evolution_sheet,
    predictions_sheet,
)
from qpenet_jax.runs.build import build_cosine_predictor, build_model, build_predictor
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_protocol,
    files_read,
)
from qpenet_jax.runs.folder import open_run, read_inputs

MAX_ROWS = 200
"""A JPEG is at most 65,535 pixels high, a row of a sheet takes 232."""

QUALITY = 92

SHEETS = {
    "predictions": predictions_sheet,
    "evolution": evolution_sheet,
    "background": background_sheet,
}


class ShownRun(NamedTuple):
    """A trained network under the name that the sheets give it."""

    name: str
    config: Any
    params: PyTree[Array]
    weights: PyTree[Array]


def draw_figures(
    workdirs: Mapping[str, Path] | Sequence[Path],
    out: Path,
    *,
    episodes: Sequence[int] | None = None,
    count: int = 6,
    seed: int = 0,
    shots: int = 1,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Writes three sheets about trained runs into `out` and returns their paths.

    `predictions.jpg` compares the runs and the cosine baseline (as Figs 4 and 5),
    `evolution.jpg` shows how the foreground prototypes come about (eqs 2-8, 13, 14),
    `background.jpg` what is background by P_global and by P_bg (as Fig. 6). The
    episodes are those of the first run's protocol, first seed: the indices `episodes`,
    or `count` random ones by `seed`. Runs are called by the mapping's keys, or by their
    variant where variants differ, or by their folder. `overrides` are other paths than
    the runs were trained with, as `open_run` takes them.

    Raises:
        InputError: a folder without a run; runs of different images, classes or sizes;
            an episode beyond the protocol; `out` can't be written.
    """
    out = local_path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another for the figures")
    runs = open_runs(workdirs, overrides)
    config = runs[0].config
    files = {name: out / f"{name}.jpg" for name in SHEETS}
    read = [path for run in runs for path in files_read(run.config)]
    refuse_overwriting(files.values(), read)
    protocol = build_protocol(config, shots=shots)
    indices = choose_episodes(protocol, episodes, count, seed)
    _check_height(len(indices), len(runs))
    val = build_dataset(config, "val")
    sampler = build_eval_samplers(config, val, protocol)[0]
    shown = show(runs, val, [sampler(i) for i in indices], protocol)
    return write_sheets(shown, protocol, files)


def write_sheets(
    shown: Sequence[ShownEpisode], protocol: Protocol, files: Mapping[str, Path]
) -> list[Path]:
    """Writes all sheets, or none if one can't be drawn."""
    notes = protocol_notes(protocol)
    content = {
        path: _jpeg(sheet(*SHEETS[name](shown, notes, protocol.resize)))
        for name, path in files.items()
    }
    for path, page in content.items():
        write_whole(path, page)
    return list(content)


def _jpeg(page: RGB) -> bytes:
    """Encodes without thinning out the colours, which would blur text and contours."""
    content = io.BytesIO()
    Image.fromarray(page).save(content, "JPEG", quality=QUALITY, subsampling=0)
    return content.getvalue()


def protocol_notes(protocol: Protocol) -> list[str]:
    """Returns the lines below each sheet that say which episodes it shows."""
    notes = [
        f"{protocol.dataset}, fold {protocol.fold}: novel classes, {protocol.shots}-"
        f"shot, seed {protocol.seeds[0]}; # is the episode's index, IoU in percent at "
        "the image's size"
    ]
    if protocol.shots > 1:
        notes.append(f"of {protocol.shots} supports the first is shown")
    return notes


# Which episodes.


def choose_episodes(
    protocol: Protocol, episodes: Sequence[int] | None, count: int, seed: int
) -> list[int]:
    """Returns the given indices, or `count` different random ones by `seed`."""
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
            f"{count} episodes by seed {seed}: give 1 to {total}, as many as the "
            "protocol has, and a seed from 0 on"
        )
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    return sorted(chosen.tolist())


def _check_height(episodes: int, runs: int) -> None:
    if episodes * runs > MAX_ROWS:
        raise InputError(
            f"{episodes} episodes of {runs} run(s) make a sheet of more than "
            f"{MAX_ROWS} rows: choose fewer"
        )


# Which runs.


def open_runs(
    workdirs: Mapping[str, Path] | Sequence[Path], overrides: Sequence[str] = ()
) -> list[ShownRun]:
    """Opens runs that can be shown side by side, under different names."""
    if not workdirs:
        raise InputError("no run is given: give the --workdir of a training")
    named = isinstance(workdirs, Mapping)
    folders = [Path(w) for w in (workdirs.values() if named else workdirs)]
    opened = [open_run(folder, overrides) for folder in folders]
    configs = [run.config for run in opened]
    names = list(workdirs) if named else names_of(folders, configs)
    check_comparable([run.folder for run in opened], configs)
    return [
        ShownRun(str(name), run.config, run.params, run.weights)
        for name, run in zip(names, opened, strict=True)
    ]


def names_of(folders: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """Returns the first of variants, folders and paths that differ for all runs."""
    variants = [config.variant for config in configs]
    for names in (variants, [f.resolve().name for f in folders], map(str, folders)):
        names = list(names)
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{folders[0]} and the others: give every run once")


def check_comparable(folders: Sequence[Path], configs: Sequence[Any]) -> None:
    """Refuses runs to which the first run's episodes would show something else."""
    facts = [
        _facts(folder, config) for folder, config in zip(folders, configs, strict=True)
    ]
    for folder, other in zip(folders, facts, strict=True):
        for name, value in facts[0].items():
            if other[name] != value:
                raise InputError(
                    f"{folder} has other {name} than {folders[0]}: figures compare "
                    "runs of one data set, fold and input size"
                )


def _facts(folder: Path, config: Any) -> dict[str, Any]:
    protocol = build_protocol(config)
    return {
        "novel classes": protocol.classes,
        "input size": (protocol.side, protocol.resize),
        "validation images": read_inputs(folder).get("validation images"),
    }


# What they predict.


def show(
    runs: Sequence[ShownRun],
    val: SegmentationDataset,
    chosen: Sequence[EpisodeIds],
    protocol: Protocol,
) -> list[ShownEpisode]:
    """Returns the chosen episodes with what the baseline and every run predict."""
    cosine = build_cosine_predictor(runs[0].config, runs[0].weights)
    views = {run.name: network_view(run) for run in runs}
    shown = []
    for ids in chosen:
        episode = load_batch_of_one(val, ids, protocol.side, protocol.resize)
        found = {name: view(episode) for name, view in views.items()}
        scene = read_scene(val, ids)
        shown.append(ShownEpisode(scene, np.asarray(cosine(episode))[0], found))
    return shown


def network_view(
    run: ShownRun,
) -> Callable[[Episode], tuple[Float[np.ndarray, "s s"], Out]]:
    """Returns a function of a batch of one: its margin and the network's `Out`."""
    _, config, params, weights = run

    def view(episode):
        margin, out = build_predictor(config, params, weights).with_intermediates(
            episode
        )
        if build_model(config).bgpe:
            # The head of eq 10 segments by whatever stands at P_global's place.
            gbc = params["gbc"] | {"P_global": out["P_bg"][0]}
            clean = build_predictor(config, params | {"gbc": gbc}, weights)
            query = clean.encode(episode.query_image, ("query",))
            out = out | {"y_bg_clean": query["y_bg_q"]}
        return jax.tree.map(lambda x: np.asarray(x[0]), (margin, out))

    return view
