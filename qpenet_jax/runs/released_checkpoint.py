"""A checkpoint of the authors' released system becomes a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from qpenet_jax.backbones.convert import save_weights
from qpenet_jax.backbones.torch_files import Tensors, read_tensors
from qpenet_jax.backbones.torch_layout import check_tensors, to_flax, under_prefix
from qpenet_jax.config import default_config, selections
from qpenet_jax.core.choices import CHECKPOINT_DATASETS
from qpenet_jax.core.errors import InputError, check_choice
from qpenet_jax.core.files import local_path, new_folder
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.models.released import state_dict
from qpenet_jax.recipes import for_coco, for_released
from qpenet_jax.runs.build import complete, params_like
from qpenet_jax.runs.config_files import override
from qpenet_jax.runs.folder import (
    CONFIG_FILE,
    OWN_BACKBONE,
    WEIGHTS,
    weights_hash,
)
from qpenet_jax.runs.published import MODEL_FILE, Facts, write_model

STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
"""Names of the deep stem's layers by their place in the authors' layer0."""

SOURCE = "checkpoint"
"""Entry of a run's inputs: the file's name; its hash is in OWN_BACKBONE."""


def import_checkpoint(
    checkpoint: str | Path,
    workdir: str | Path,
    *,
    fold: int,
    dataset: str = "pascal",
    overrides: Sequence[str] = (),
) -> Path:
    """Makes a published run of the authors' checkpoint and returns its folder.

    The run holds the checkpoint's own backbone: batch norm was not always frozen when
    it was trained. `overrides` are fields of the config, such as
    `--config.dataset.root=DIR`. Nothing is left behind if the file can't be used.

    Raises:
        InputError: no such checkpoint, or tensors that don't fit (all are named), or a
            workdir that exists.
    """
    source, folder = local_path(checkpoint), local_path(workdir)
    check_choice("dataset ", dataset, CHECKPOINT_DATASETS)
    check_choice("fold ", fold, range(4))
    with new_folder(folder) as made:
        tensors = read_tensors(source)
        backbone, head = _split(under_prefix(tensors, state_dict.names().keys()))
        name = "resnet101" if "layer3.22.conv1.weight" in backbone else "resnet50"
        config = complete(override(_config(name, fold, dataset), overrides))
        try:
            _check_head(head, params_like(config))
            weights = to_flax(config.backbone.name, backbone, deep=True)
        except InputError as error:
            raise InputError(
                f"{source} is no checkpoint of the released QPENet: {error}"
            ) from None
        name = config.backbone.name
        save_weights(made / OWN_BACKBONE, name, weights, source)
        inputs = {WEIGHTS: weights_hash(weights), SOURCE: source.name}
        facts = Facts(0, selections(config)[0], inputs)
        write_model(made / MODEL_FILE, state_dict.to_params(head), "float32", facts)
        write_json(made / CONFIG_FILE, json.loads(config.to_json()))
    return folder


def _config(resnet: str, fold: int, dataset: str) -> Any:
    config = default_config()
    if dataset == "coco":
        config = for_coco(config)
    config.dataset.fold = fold
    config.backbone.name = f"{resnet}_deepstem"
    config = for_released(config)
    config.backbone.weights = OWN_BACKBONE  # beside the config
    return config


def _split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Returns the backbone's tensors by the names of PSPNet's files, and the others."""
    backbone, head = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("layer0."):
            _, place, field = [*name.split(".", 2), "", ""][:3]
            name = f"{STEM.get(place, f'layer0.{place}')}.{field}"
        part = backbone if name.startswith(("layer", *STEM.values())) else head
        if name in part:
            raise InputError(f"the checkpoint holds {name} twice, also in layer0")
        part[name] = tensor
    return backbone, head


def _check_head(head: Tensors, params: Any) -> None:
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    expected = {
        name: state_dict.torch_shape(name, leaves[path].shape)
        for name, path in state_dict.names().items()
    }
    check_tensors("the tensors beside its backbone", expected, head)
