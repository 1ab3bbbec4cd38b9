"""A run as one folder that can be shared: parameters, config and model card."""

import json
from pathlib import Path, PurePath
from typing import Any

import jax

from qpenet_jax.backbones.convert import save_weights, wheel_file
from qpenet_jax.config import selections
from qpenet_jax.core.files import local_path, new_folder, write_whole
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.runs.build import PATHS
from qpenet_jax.runs.card import CARD_FILE, model_card
from qpenet_jax.runs.folder import (
    CONFIG_FILE,
    OWN_BACKBONE,
    TrainedRun,
    open_run,
    read_inputs,
)
from qpenet_jax.runs.model_file import MODEL_FILE, write_model


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

    It holds `model.safetensors`, `config.json` and the model card, and is opened as a
    run is. In "float16" or "bfloat16" the parameters take half the room and are
    rounded. The backbone's weights are named by their hash, unless the run has its own
    or they are asked for; they aren't rounded. `license` is an identifier of the hub,
    such as "apache-2.0". Nothing is left behind if anything fails.

    Raises:
        InputError: as `open_run`; `out` exists and isn't empty; a value is too large
            for `dtype`.
    """
    folder = local_path(out)
    with new_folder(folder) as made:
        run = open_run(local_path(workdir), selection=selection)
        chosen = selection or selections(run.config)[0]
        inputs = read_inputs(run.folder)
        with_backbone = with_backbone or (run.folder / OWN_BACKBONE).exists()
        if with_backbone:
            _write_backbone(made / OWN_BACKBONE, run)
        write_model(made / MODEL_FILE, run.params, dtype, run.step, chosen, inputs)
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
