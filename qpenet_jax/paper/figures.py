"""`qpenet figures`: what QPENet's parts do on chosen episodes (paper, Figs 4-6)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, refuse_overwriting, write_whole
from qpenet_jax.core.types import Episode
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
from qpenet_jax.runs.folder import TrainedRun, open_run, read_inputs

MAX_ROWS = 200
"""A JPEG is at most 65,535 pixels high, a row of a sheet takes 232."""

QUALITY = 92

SHEETS = {
    "predictions": predictions_sheet,
    "evolution": evolution_sheet,
    "background": background_sheet,
}


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
    out = local_path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another for the figures")
    opened = [open_run(folder, overrides) for folder in workdirs]
    config = opened[0].config
    files = {name: out / f"{name}.jpg" for name in SHEETS}
    read = [path for run in opened for path in files_read(run.config)]
    refuse_overwriting(files.values(), read)
    protocol = build_protocol(config, shots=shots)
    indices = list(episodes or random_episodes(protocol, count, seed))
    check_choices(opened, protocol, indices)
    val = build_dataset(config, "val")
    sampler = build_eval_samplers(config, val, protocol)[0]
    runs = dict(zip(names_of(opened), opened, strict=True))
    shown = [show(runs, val, sampler(i), protocol) for i in indices]
    return write_sheets(shown, protocol, files)


def write_sheets(
    shown: Sequence[ShownEpisode], protocol: Protocol, files: dict[str, Path]
) -> list[Path]:
    """Writes all sheets, or none if one can't be drawn."""
    pages = {}
    for name, path in files.items():
        content = SHEETS[name](shown, protocol.resize)
        notes = [*protocol_notes(protocol), *content.notes]
        pages[path] = _jpeg(sheet(*content._replace(notes=notes)))
    for path, page in pages.items():
        write_whole(path, page)
    return list(pages)


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
    first, *others = ((run.folder, _facts(run)) for run in runs)
    for folder, facts in others:
        for name, value in facts.items():
            if value != first[1][name]:
                raise InputError(
                    f"{folder} has other {name} than {first[0]}: figures compare "
                    "runs of one data set, fold and input size"
                )


def _facts(run: TrainedRun) -> dict[str, Any]:
    protocol = build_protocol(run.config)
    return {
        "novel classes": protocol.classes,
        "input size": (protocol.side, protocol.resize),
        "validation images": read_inputs(run.folder).get("validation images"),
    }


def names_of(runs: Sequence[TrainedRun]) -> list[str]:
    """Returns the runs' variants if they differ, or else their folders."""
    for names in ([r.config.variant for r in runs], [str(r.folder) for r in runs]):
        if len(set(names)) == len(runs):
            return names
    raise InputError(f"{runs[0].folder} and the others: give every run once")


def show(
    runs: dict[str, TrainedRun], val: Any, ids: EpisodeIds, protocol: Protocol
) -> ShownEpisode:
    """Returns an episode with what the baseline and every run predict for it."""
    episode = load_batch_of_one(val, ids, protocol.side, protocol.resize)
    first = next(iter(runs.values()))
    cosine = build_cosine_predictor(first.config, first.weights)(episode)
    found = {name: network_view(run, episode) for name, run in runs.items()}
    return ShownEpisode(read_scene(val, ids), np.asarray(cosine)[0], found)


def network_view(
    run: TrainedRun, episode: Episode
) -> tuple[Float[np.ndarray, "s s"], Out]:
    """Returns the margin of a batch of one, and the network's `Out`."""
    config, params, weights = run.config, run.params, run.weights
    predict = build_predictor(config, params, weights)
    margin, out = predict.with_intermediates(episode)
    if build_model(config).bgpe:
        # The head of eq 10 segments by whatever stands at P_global's place.
        gbc = params["gbc"] | {"P_global": out["P_bg"][0]}
        clean = build_predictor(config, params | {"gbc": gbc}, weights)
        query = clean.encode(episode.query_image, ("query",))
        out = out | {"y_bg_clean": query["y_bg_q"]}
    return jax.tree.map(lambda x: np.asarray(x[0]), (margin, out))
