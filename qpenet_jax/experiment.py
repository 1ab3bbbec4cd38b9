"""From a config to the objects of an experiment: data, networks, protocol."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from qpenet_jax.checkpoints import restore_params
from qpenet_jax.datasets.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    Fold,
    coco_fold,
    pascal_fold,
)
from qpenet_jax.datasets.shapes import Shapes
from qpenet_jax.datasets.voc import VOCLayout
from qpenet_jax.episodes import EpisodeSampler
from qpenet_jax.errors import InputError
from qpenet_jax.evaluation import Protocol, make_eval_step, write_json
from qpenet_jax.losses import LossWeights
from qpenet_jax.models.backbone import Backbone, backbone
from qpenet_jax.models.cosine import nearest_prototype
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.training import Optimizer, TrainState, init_state, make_train_step
from qpenet_jax.transforms import Augmentation
from qpenet_jax.typing import Episode, SegmentationDataset
from qpenet_jax.weights import load_weights

CONFIG_FILE = "config.json"

# What a resumed run may change, as no result depends on it.
FREE = {"workers", "log_every", "save_every", "dataset.root", "backbone.weights"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes; nothing is read before it is asked for."""

    config: Any  # an ml_collections.ConfigDict with the fields of configs/common.py

    def __post_init__(self):
        """Refuse values that could only fail later."""
        whole = ("batch_size", "shots", "log_every", "save_every")
        counts = {name: self.config[name] for name in whole}
        counts["eval.every"] = self.config.eval.every
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"config.{name}={value} must be 1 or more")
        if self.config.seed < 0:
            raise InputError(f"config.seed={self.config.seed} must be 0 or more")
        unknown = set(self.config.eval.focus) - set(self.protocol().classes)
        if unknown:
            raise InputError(
                f"config.eval.focus names {', '.join(sorted(unknown))}, not novel in "
                f"fold {self.config.dataset.fold}: choose of "
                f"{', '.join(self.protocol().classes)}"
            )
        if self.config.side % 8 != 1 or self.config.side < 17:
            raise InputError(
                f"config.side={self.config.side} must be 8 n + 1 and at least 17, "
                "such as 161, 321 or 473"
            )
        _ = self.fold, self.backbone, self.model, self.optimizer

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the data set."""
        data = self.config.dataset
        if data.kind == "shapes":
            return Shapes("val", 1).classes
        return PASCAL_CLASSES if data.split == "pascal" else COCO_CLASSES

    @property
    def fold(self) -> Fold:
        """Base and novel class ids."""
        data = self.config.dataset
        folds: dict[str, Callable[[int], Fold]] = {
            "pascal": pascal_fold,
            "coco_fwb": functools.partial(coco_fold, split="fwb"),
            "coco_panet": functools.partial(coco_fold, split="panet"),
        }
        if data.split not in folds:
            raise InputError(
                f"config.dataset.split={data.split!r}: choose {', '.join(folds)}"
            )
        return folds[data.split](data.fold)

    def dataset(self, split: Literal["train", "val"]) -> SegmentationDataset:
        """Return the images of a split; raises InputError where files are missing."""
        # pyright takes a cached_property for no match of a protocol's property.
        return self._dataset(split)  # pyright: ignore[reportReturnType]

    def _dataset(self, split):
        data = self.config.dataset
        if data.kind == "shapes":
            return Shapes(split, data[f"{split}_images"], data.side, self.config.seed)
        if data.kind != "voc":
            raise InputError(
                f"config.dataset.kind={data.kind!r}: choose 'voc' or 'shapes'"
            )
        ids = data[f"{split}_ids"]
        return VOCLayout(data.root, ids, self.class_names, data.images, data.masks)

    def train_sampler(self, dataset: SegmentationDataset) -> EpisodeSampler:
        """Return the training episodes: base classes."""
        data = self.config.dataset
        return EpisodeSampler(
            dataset.counts,
            self.fold.base,
            self.config.shots,
            self.config.seed,
            exclude=self.fold.novel if data.exclude_novel else (),
            min_pixels=data.min_pixels,
            on_few=data.on_few,
            class_names=self.class_names,
        )

    def protocol(self, **changes: Any) -> Protocol:
        """Return how this experiment is evaluated: novel classes of the val split."""
        config = self.config
        fields = {
            "dataset": config.dataset.name,
            "fold": config.dataset.fold,
            "classes": tuple(self.class_names[c - 1] for c in self.fold.novel),
            "shots": config.shots,
            "episodes": config.eval.episodes,
            "seeds": tuple(config.eval.seeds),
            "side": config.side,
            "scoring": config.eval.scoring,
            "min_pixels": config.dataset.min_pixels,
        }
        return Protocol(**fields | changes)

    def eval_samplers(
        self, dataset: SegmentationDataset, protocol: Protocol
    ) -> list[EpisodeSampler]:
        """Return the protocol's episodes, one sampler a seed."""
        return [
            EpisodeSampler(
                dataset.counts,
                self.fold.novel,
                protocol.shots,
                seed,
                min_pixels=protocol.min_pixels,
                on_few=self.config.dataset.on_few,
                class_names=self.class_names,
            )
            for seed in protocol.seeds
        ]

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return backbone(self.config.backbone.name)

    def backbone_weights(self) -> PyTree[Array]:
        """Read the frozen weights onto the device."""
        spec = self.config.backbone
        return jax.tree.map(
            jax.numpy.asarray, load_weights(spec.name, spec.weights or None)
        )

    @property
    def model(self) -> QPENet:
        """QPENet proper, over the backbone's features."""
        return QPENet(**self.config.model)

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser's settings."""
        return Optimizer(**self.config.optimizer)

    @property
    def augmentation(self) -> Augmentation:
        """The training augmentation."""
        fields: dict[str, Any] = dict(self.config.augmentation)
        fields["scale"] = tuple(fields["scale"])  # a list when read from JSON
        return Augmentation(**fields)

    def steps(self, listed_images: int) -> int:
        """Return the length of training in steps."""
        epoch = listed_images // self.config.batch_size
        steps = self.config.steps or self.config.epochs * epoch
        if steps < 1:
            raise InputError(
                f"{listed_images} images make no batch of {self.config.batch_size}: "
                "add images, or lower config.batch_size"
            )
        return steps

    def init(self, tx: optax.GradientTransformation) -> TrainState:
        """Return the state at step 0."""
        key = jax.random.key(self.config.seed)
        return init_state(self.model, tx, channels=self.backbone.channels, key=key)

    def untrained(self) -> PyTree[Array]:
        """Return the parameters that training starts from."""
        return self.init(optax.identity()).params

    def train_step(self, tx: optax.GradientTransformation):
        """Return the jitted train step."""
        loss = LossWeights(**self.config.loss)
        return make_train_step(self.model, self.backbone, tx, loss)

    def predictor(
        self, weights: PyTree[Array]
    ) -> Callable[[PyTree[Array], Episode], Array]:
        """Return `predict(params, batch)`, foreground's lead in QPENet's logits."""

        def forward(params, *inputs) -> Any:
            return self.model.apply({"params": params}, *inputs)

        step = make_eval_step(forward, self.backbone)
        return lambda params, batch: step(params, weights, batch)

    def cosine_predictor(self, weights: PyTree[Array]) -> Callable[[Episode], Array]:
        """Return `predict(batch)` of the training-free baseline, same features."""

        def forward(_, *inputs):
            return nearest_prototype(*inputs)

        step = make_eval_step(forward, self.backbone)
        return lambda batch: step({}, weights, batch)


def claim(workdir: Path, config: Any) -> None:
    """Write the config into a new workdir, or check that it's that of an old one.

    Raises InputError naming the differing fields.
    """
    path = workdir / CONFIG_FILE
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = _read_config(path)
        changed = sorted(
            key
            for key in _flat(ours).keys() | _flat(theirs).keys()
            if _flat(ours).get(key) != _flat(theirs).get(key) and key not in FREE
        )
        if changed:
            raise InputError(
                f"{workdir} holds a run of another config ({', '.join(changed)} "
                "differ): choose another --workdir, or give the same config to resume"
            )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)


def open_run(workdir: str | Path) -> tuple[Experiment, PyTree[Array]]:
    """Return the experiment of a finished or running workdir and its best parameters.

    Raises InputError if it holds no run or no checkpoint yet.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise InputError(
            f"{workdir} is no run: it has no {CONFIG_FILE}; give the --workdir of "
            "train.py"
        )
    try:
        experiment = Experiment(ConfigDict(_read_config(path)))
        like = experiment.untrained()
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no config of this version: {error}") from None
    return experiment, restore_params(Path(workdir), like)


def _read_config(path: Path) -> dict[str, Any]:
    remedy = "restore it, or use another --workdir"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a config: {remedy}")
    return content


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
