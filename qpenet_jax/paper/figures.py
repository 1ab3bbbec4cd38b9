"""`qpenet figures`: what QPENet's parts do on chosen episodes (paper, Figs 4-6)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.core.types import Episode
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.evaluation.pictures import load_batch_of_one, read_scene, sheet
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.models.prototypes import foreground_margin
from qpenet_jax.paper.sheets import (
    SHEETS,
    Maps,
    ShownEpisode,
    at_input_size,
    draw_sheet,
)
from qpenet_jax.runs.build import build_cosine_predictor, build_model, build_predictor
from qpenet_jax.runs.datasets import (
    build_dataset,
    build_eval_samplers,
    build_protocol,
    files_read,
)
from qpenet_jax.runs.folder import TrainedRun, open_run, read_inputs

MAX_ROWS = 200
"""A JPEG is at most 65,535 pixels high, a row of a sheet takes 232."""


def draw_figures(
    workdirs: Sequence[Path],
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
    or `count` random ones by `seed`. Runs are called by their variant where variants
    differ, or by their folder. `overrides` are other paths than the runs were trained
    with, as `open_run` takes them.

    Raises:
        InputError: a folder without a run; runs of different images, classes or sizes;
            an episode beyond the protocol; `out` can't be written.
    """
    opened = [open_run(folder, overrides) for folder in workdirs]
    config = opened[0].config
    files = {name: local_path(out) / f"{name}.jpg" for name in SHEETS}
    read = [path for run in opened for path in files_read(run.config)]
    refuse_overwriting(files.values(), read)
    protocol = build_protocol(config, shots=shots)
    indices = list(episodes or random_episodes(protocol, count, seed))
    check_choices(opened, protocol, indices)
    val = build_dataset(config, "val")
    sampler = build_eval_samplers(config, val, protocol)[0]
    runs = by_name(opened)
    shown = [show(runs, val, sampler(i), protocol) for i in indices]
    return write_sheets(shown, protocol, files)


def write_sheets(
    shown: Sequence[ShownEpisode], protocol: Protocol, files: Mapping[str, Path]
) -> list[Path]:
    """Writes all sheets, or none if one can't be drawn."""
    notes = protocol_notes(protocol)
    pages = {
        path: sheet(*draw_sheet(SHEETS[name], shown, protocol.resize, notes))
        for name, path in files.items()
    }
    for path, page in pages.items():
        content = io.BytesIO()
        # Thinned out, the colours would blur text and contours.
        Image.fromarray(page).save(content, "JPEG", quality=92, subsampling=0)
        write_whole(path, content.getvalue())
    return list(pages)


def protocol_notes(protocol: Protocol) -> list[str]:
    """Returns the lines below each sheet that say which episodes it shows."""
    first = (
        f"{protocol.dataset}, fold {protocol.fold}: novel classes, {protocol.shots}-"
        f"shot, seed {protocol.seeds[0]}; # is the episode's index, IoU in percent at "
        "the image's size"
    )
    second = f"of {protocol.shots} supports the first is shown"
    return [first, second] if protocol.shots > 1 else [first]


def random_episodes(protocol: Protocol, count: int, seed: int) -> list[int]:
    """Returns the indices of `count` different episodes, chosen by `seed`."""
    total = protocol.episodes
    if not 1 <= count <= total or seed < 0:
        raise InputError(
            f"{count} episodes by seed {seed}: give 1 to {total}, as many as the "
            "protocol has, and a seed from 0 on"
        )
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    return sorted(chosen.tolist())


def check_choices(
    runs: Sequence[TrainedRun], protocol: Protocol, indices: Sequence[int]
) -> None:
    """Refuses episodes and runs that don't fit together on one sheet.

    To all runs the first run's episodes must show the same.
    """
    for i in indices:
        if not 0 <= i < protocol.episodes:
            raise InputError(
                f"episode {i}: the protocol has episodes 0 to {protocol.episodes - 1}"
            )
    if len(indices) * len(runs) > MAX_ROWS:
        raise InputError(
            f"{len(indices)} episodes of {len(runs)} run(s) make a sheet of more than "
            f"{MAX_ROWS} rows: choose fewer"
        )
    facts = [_facts(run) for run in runs]
    for run, of_run in zip(runs, facts, strict=True):
        if differ := [name for name in of_run if of_run[name] != facts[0][name]]:
            raise InputError(
                f"{run.folder} has other {differ[0]} than {runs[0].folder}: figures "
                "compare runs of one data set, fold and input size"
            )


def _facts(run: TrainedRun) -> dict[str, Any]:
    protocol = build_protocol(run.config)
    return {
        "novel classes": protocol.classes,
        "input size": (protocol.side, protocol.resize),
        "validation images": read_inputs(run.folder).get("validation images"),
    }


def by_name(runs: Sequence[TrainedRun]) -> dict[str, TrainedRun]:
    """Returns the runs by their variants if these differ, or else by their folders."""
    variants = {run.config.variant: run for run in runs}
    if len(variants) == len(runs):
        return variants
    return {str(run.folder): run for run in runs}


def show(
    runs: Mapping[str, TrainedRun], val: Any, ids: EpisodeIds, protocol: Protocol
) -> ShownEpisode:
    """Returns an episode with what the baseline and every run predict for it."""
    episode = load_batch_of_one(val, ids, protocol.side, protocol.resize)
    first = next(iter(runs.values()))
    cosine = build_cosine_predictor(first.config, first.weights)(episode)
    found = {name: network_maps(run, episode) for name, run in runs.items()}
    return ShownEpisode(read_scene(val, ids), np.asarray(cosine)[0], found)


def network_maps(run: TrainedRun, episode: Episode) -> Maps:
    """Returns what a run finds in a batch of one."""
    config, params, weights = run.config, run.params, run.weights
    predict = build_predictor(config, params, weights)
    margin, out = predict(episode, named=True)
    logits = {name: out[name] for name in ("y_pre", "y_bg_q") if name in out}
    if "y_rev" in out:
        logits["y_rev"] = out["y_rev"][:, 0]
    if build_model(config).bgpe:
        # The head of eq 10 segments by whatever stands at P_global's place.
        gbc = params["gbc"] | {"P_global": out["P_bg"][0]}
        clean = build_predictor(config, params | {"gbc": gbc}, weights)
        query = clean.encode(episode.query_image, ("query",))
        logits["y_bg_clean"] = query["y_bg_q"]
    grids = {name: foreground_margin(values) for name, values in logits.items()}
    grids |= {name: out[name] for name in ("A_main", "A_aux") if name in out}
    maps = {name: at_input_size(np.asarray(grid[0])) for name, grid in grids.items()}
    return maps | {"prediction": np.asarray(margin[0])}
