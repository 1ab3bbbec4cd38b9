"""From a config to the objects of an experiment: data, networks, protocol."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from qpenet_jax.training.checkpoints import restore_params
from qpenet_jax.data.sources.decoded import Decoded
from qpenet_jax.data.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    Fold,
    coco_fold,
    fold_of,
    named_fold,
    pascal_fold,
)
from qpenet_jax.data.sources.prepared import Prepared, prepared_classes
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.device_augmentation import (
    augment_episodes,
    canvas_side,
    load_raw_episode,
)
from qpenet_jax.data.episode_lists import EpisodeList
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler, Order, Targets, load_episode
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.scoring import Predictor, cosine_predictor, qpenet_predictor
from qpenet_jax.models.losses import LossWeights
from qpenet_jax.backbones.registry import Backbone, backbone, choose_stages
from qpenet_jax.models.ops.precision import DTYPES, in_dtype
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.evaluation.protocols import (
    PRESETS,
    Protocol,
    dataset_version,
    preset_fields,
)
from qpenet_jax.runs.recipes import resolved
from qpenet_jax.evaluation.report import write_json
from qpenet_jax.training.step import Optimizer, TrainState, init_state, make_train_step
from qpenet_jax.data.transforms import Augmentation
from qpenet_jax.core.files import cache_folder
from qpenet_jax.core.types import Episode, SegmentationDataset
from qpenet_jax.backbones.convert import load_weights

CONFIG_FILE = "config.json"

INPUTS_FILE = "inputs.json"

DECODED = cache_folder("decoded")
"""Decoded training images, by data set; only what augments on the device needs them."""

# What a resumed run may change, as no result depends on it: of the last two, the
# contents are compared.
FREE = {
    "workers",
    "log_every",
    "save_every",
    "keep_compilations",
    "dataset.root",
    "backbone.weights",
}


SELECTION = {
    "base": "best of the run by mIoU on base classes of the val split",
    "novel": "best of the run by mIoU on the novel classes: this leaks them (the "
    "field's custom)",
    "last": "the last of the run",
}
"""What `config.select_on` may be, as the results tell it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes; nothing is read before it is asked for."""

    config: Any  # an ml_collections.ConfigDict with the fields of configs/common.py

    def __post_init__(self):
        """Fill in the recipe's values; refuse values that could only fail later."""
        object.__setattr__(self, "config", resolved(self.config))
        whole = ("batch_size", "shots", "log_every", "save_every")
        counts = {name: self.config[name] for name in whole}
        for name in ("every", "base_episodes"):
            counts[f"eval.{name}"] = self.config.eval[name]
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"config.{name}={value} must be 1 or more")
        if self.config.select_on not in SELECTION:
            raise InputError(
                f"config.select_on={self.config.select_on!r}: choose "
                f"{', '.join(SELECTION)}"
            )
        where = ("auto", "device", "host")
        if self.config.augment_on not in where:
            raise InputError(
                f"config.augment_on={self.config.augment_on!r}: choose "
                f"{', '.join(where)}"
            )
        for name, kind in (("order", Order), ("targets", Targets)):
            value = self.config.dataset.get(name, get_args(kind)[0])
            if value not in get_args(kind):
                raise InputError(
                    f"config.dataset.{name}={value!r}: choose "
                    f"{', '.join(get_args(kind))}"
                )
        if self.config.seed < 0:
            raise InputError(f"config.seed={self.config.seed} must be 0 or more")
        unknown = set(self.config.eval.focus) - set(self.protocol().classes)
        if unknown:
            raise InputError(
                f"config.eval.focus names {', '.join(sorted(unknown))}, not novel in "
                f"fold {self.config.dataset.fold}: choose of "
                f"{', '.join(self.protocol().classes)}"
            )
        if self.config.dtype not in DTYPES:
            raise InputError(
                f"config.dtype={self.config.dtype!r}: choose {', '.join(DTYPES)}"
            )
        _ = self.fold, self.backbone, self.model, self.optimizer

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the data set."""
        data = self.config.dataset
        if data.kind == "shapes":
            return Shapes("val", 1).classes
        if data.split == "pascal":
            return PASCAL_CLASSES
        if data.split.startswith("coco"):
            return COCO_CLASSES
        if data.kind != "prepared":
            raise InputError(
                f"config.dataset.split={data.split!r} needs the class names of a "
                "prepared data set: config.dataset.kind=prepared"
            )
        return prepared_classes(data.root)

    @functools.cached_property
    def fold(self) -> Fold:
        """Base and novel class ids."""
        data = self.config.dataset
        rules: dict[str, Callable[[int], Fold]] = {
            "pascal": pascal_fold,
            "coco_fwb": functools.partial(coco_fold, split="fwb"),
            "coco_panet": functools.partial(coco_fold, split="panet"),
            "blocks": lambda i: fold_of(len(self.class_names), i, data.folds, "blocks"),
            "strided": lambda i: fold_of(
                len(self.class_names), i, data.folds, "strided"
            ),
            "named": lambda _: named_fold(self.class_names, tuple(data.novel)),
        }
        if data.split not in rules:
            raise InputError(
                f"config.dataset.split={data.split!r}: choose {', '.join(rules)}"
            )
        return rules[data.split](data.fold)

    def dataset(self, split: Literal["train", "val"]) -> SegmentationDataset:
        """Return the images of a split; raises InputError where files are missing."""
        # pyright takes a cached_property for no match of a protocol's property.
        return self._dataset(split)  # pyright: ignore[reportReturnType]

    def _dataset(self, split):
        data = self.config.dataset
        if data.kind == "shapes":
            return Shapes(split, data[f"{split}_images"], data.side, self.config.seed)
        if data.kind == "prepared":
            return self._prepared(split)
        if data.kind != "voc":
            raise InputError(
                f"config.dataset.kind={data.kind!r}: choose 'prepared', 'voc' or "
                "'shapes'"
            )
        ids = data[f"{split}_ids"]
        return VOCLayout(data.root, ids, self.class_names, data.images, data.masks)

    def _prepared(self, split):
        root = self.config.dataset.root
        dataset = Prepared(root, split)
        if dataset.classes != self.class_names:
            raise InputError(
                f"{root} has {len(dataset.classes)} other classes than "
                f"config.dataset.split={self.config.dataset.split!r} expects; choose "
                "'blocks', 'strided' or 'named'"
            )
        return dataset

    def train_sampler(self, dataset: SegmentationDataset) -> EpisodeSampler:
        """Return the training episodes: base classes."""
        data = self.config.dataset
        if not self.fold.base:
            raise InputError(
                "there is no base class to train on: config.dataset.novel names all"
            )
        return EpisodeSampler(
            dataset.counts,
            self.fold.base,
            self.config.shots,
            self.config.seed,
            exclude=self.fold.novel if data.exclude_novel else (),
            min_pixels=data.min_pixels,
            on_few=data.on_few,
            order=data.get("order", "shuffled"),
            targets=data.get("targets", "large"),
            class_names=self.class_names,
        )

    def protocol(self, preset: str | None = None, **changes: Any) -> Protocol:
        """Return how this experiment is evaluated: novel classes of the val split.

        The preset is the config's, with the config's changes, unless one is given;
        what the run itself settles (data, shots, training list) is never the preset's.
        """
        config, data = self.config, self.config.dataset
        fields: dict[str, Any] = {
            "dataset": data.name,
            "split": data.split,
            "fold": data.fold,
            "classes": self._names(self.fold.novel),
            "exclude_novel": data.exclude_novel,
            "min_pixels": data.min_pixels,
            "shots": config.shots,
            "preset": preset or config.eval.protocol,
        }
        if "side" not in PRESETS.get(fields["preset"], {}):
            fields["side"] = config.side
        if preset is None:
            chosen = {k: config.eval[k] for k in ("episodes", "seeds", "scoring")}
            fields |= {k: v for k, v in chosen.items() if v}
        fields = preset_fields(fields["preset"], data.split) | fields | changes
        fields["seeds"] = tuple(fields["seeds"])  # a list when read from JSON
        return Protocol(**fields)

    def selection_protocol(self) -> Protocol | None:
        """Return how checkpoints are chosen while training; None: the last is."""
        if self.config.select_on == "base":
            return self.protocol(
                preset="ours",
                classes=self._names(self.fold.base),
                episodes=self.config.eval.base_episodes,
            )
        return self.protocol() if self.config.select_on == "novel" else None

    @property
    def identity(self) -> str:
        """A hash of all that this experiment's results depend on."""
        fields = _flat(json.loads(self.config.to_json()))
        text = json.dumps({k: v for k, v in fields.items() if k not in FREE})
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def selection(self) -> str:
        """How this run's checkpoint was chosen, for its results."""
        return SELECTION[self.config.select_on]

    def _names(self, class_ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.class_names[c - 1] for c in class_ids)

    def check_novel(self, episodes: EpisodeList) -> None:
        """Refuse a list with classes that this experiment trains on.

        Raises:
            InputError: naming one.
        """
        shown = {c for sampler in episodes.samplers for c in sampler.shown}
        for class_id in sorted(shown - set(self.fold.novel)):
            raise InputError(
                f"the episode list shows {self.class_names[class_id - 1]}, which isn't "
                f"novel in fold {self.config.dataset.fold}: give a list of this fold"
            )

    def eval_samplers(
        self, dataset: SegmentationDataset, protocol: Protocol, drop_few: bool = False
    ) -> list[EpisodeSampler]:
        """Return the protocol's episodes, one sampler a seed.

        Images for base classes, when the protocol names those, show no novel class;
        base classes with too few images are left out, novel ones if `drop_few`.
        """
        base = protocol.classes == self._names(self.fold.base)
        return [
            EpisodeSampler(
                dataset.counts,
                tuple(self.class_names.index(name) + 1 for name in protocol.classes),
                protocol.shots,
                seed,
                exclude=self.fold.novel if base else (),
                min_pixels=protocol.min_pixels,
                on_few="drop" if base or drop_few else self.config.dataset.on_few,
                order=protocol.order,
                targets=protocol.targets,
                class_names=self.class_names,
            )
            for seed in protocol.seeds
        ]

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The frozen network, with those of its stages that QPENet is given."""
        net = backbone(self.config.backbone.name)
        stages = tuple(self.config.backbone.get("stages", ()))
        return choose_stages(net, stages) if stages else net

    def backbone_weights(self) -> PyTree[Array]:
        """Read the frozen weights onto the device."""
        spec = self.config.backbone
        return jax.tree.map(
            jax.numpy.asarray, load_weights(spec.name, spec.weights or None)
        )

    @property
    def model(self) -> QPENet:
        """QPENet proper or a variant of it, over the backbone's features."""
        if self.config.variant not in VARIANTS:
            raise InputError(
                f"config.variant={self.config.variant!r}: choose {', '.join(VARIANTS)}"
            )
        fields = {**self.config.model, **VARIANTS[self.config.variant].fields}
        return QPENet(**fields)

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

    @property
    def augments_on_device(self) -> bool:
        """Whether the device augments the training images, not the host."""
        where = self.config.augment_on
        return where == "device" or (where == "auto" and jax.default_backend() != "cpu")

    def loader(self, dataset: SegmentationDataset) -> Callable[[EpisodeIds], Any]:
        """Return what loads a training episode; `augmented` takes a batch of them.

        For the device the images are decoded once into a file in DECODED. Raises
        InputError where that can't be.
        """
        options: dict[str, Any] = {
            "side": self.config.side,
            "augmentation": self.augmentation,
            "seed": self.config.seed,
        }
        if not self.augments_on_device:
            return functools.partial(load_episode, dataset, **options)
        decoded = Decoded(dataset, DECODED)
        canvas = canvas_side(decoded.sizes)
        return functools.partial(load_raw_episode, decoded, canvas=canvas, **options)

    def augmented(self, batch: Any) -> Episode:
        """Return a batch as the train step takes it."""
        if not self.augments_on_device:
            return batch
        return augment_episodes(batch, side=self.config.side)

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
        return make_train_step(*self._computing, tx, loss)

    def predictor(self, params: PyTree[Array], weights: PyTree[Array]) -> Predictor:
        """Return QPENet with trained parameters over the frozen weights."""
        return qpenet_predictor(*self._computing, params, weights)

    def cosine_predictor(self, weights: PyTree[Array]) -> Predictor:
        """Return the training-free baseline, on all stages: they serve it best."""
        whole = backbone(self.config.backbone.name)
        _, net = in_dtype(self.model, whole, self.config.dtype)
        return cosine_predictor(net, weights)

    @property
    def _computing(self) -> tuple[Any, Any]:
        """The network and its backbone in `config.dtype`."""
        return in_dtype(self.model, self.backbone, self.config.dtype)


def claim(workdir: Path, config: Any, inputs: dict[str, str]) -> None:
    """Write the config into a new workdir, or check that it's that of an old one.

    `inputs` are hashes of what the config names by path. Raises InputError naming what
    differs.
    """
    path = workdir / CONFIG_FILE
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = read_json(path)
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
        write_json(path, ours)
    path = workdir / INPUTS_FILE
    theirs = read_json(path) if path.exists() else inputs
    changed = sorted(name for name in inputs if inputs[name] != theirs.get(name))
    if changed:
        raise InputError(
            f"{workdir} holds a run on other inputs ({', '.join(changed)} differ from "
            "what it started with): give the same data and weights, or choose another "
            "--workdir"
        )
    write_json(path, inputs)


def inputs_of(
    train: SegmentationDataset, val: SegmentationDataset, weights: PyTree[Array]
) -> dict[str, str]:
    """Return hashes of the images' names and pixel counts, and of the weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        digest.update(np.asarray(leaf).tobytes())
    return {
        "training images": dataset_version(train),
        "validation images": dataset_version(val),
        "backbone weights": digest.hexdigest()[:12],
    }


def open_run(workdir: str | Path) -> tuple[Experiment, PyTree[Array], int]:
    """Return a workdir's experiment, the parameters that it selected, and their step.

    Raises InputError if it holds no run or no checkpoint yet.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise InputError(
            f"{workdir} is no run: it has no {CONFIG_FILE}; give the --workdir of "
            "train.py"
        )
    try:
        experiment = Experiment(ConfigDict(read_json(path)))
        like = experiment.untrained()
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no config of this version: {error}") from None
    return experiment, *restore_params(Path(workdir), like)


def read_json(path: Path) -> dict[str, Any]:
    """Return a file of a workdir; raises InputError if it is broken."""
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
