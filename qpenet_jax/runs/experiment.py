"""From a config to the objects of an experiment: data, networks, protocol."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, PyTree

from qpenet_jax.backbones.batch_norm import settled
from qpenet_jax.backbones.convert import load_weights
from qpenet_jax.backbones.precision import in_dtype, meant
from qpenet_jax.backbones.registry import Backbone, backbone, choose_stages
from qpenet_jax.backbones.torch_layout import no_statistics
from qpenet_jax.config import check, check_fields, selections
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.fields import flat
from qpenet_jax.core.files import local_path
from qpenet_jax.core.runtime import refuse_64_bits
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.folds import Fold
from qpenet_jax.evaluation.predictor import (
    Predictor,
    cosine_predictor,
    mean_predictor,
    qpenet_predictor,
    self_support_predictor,
)
from qpenet_jax.evaluation.protocols import PRESETS, Protocol, preset_fields
from qpenet_jax.models.losses import LossWeights, total_loss
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.released.losses import released_loss
from qpenet_jax.models.released.network import NAME as RELEASED
from qpenet_jax.models.released.network import ReleasedQPENet, behaves
from qpenet_jax.runs.datasets import (
    chosen_fold,
    class_names,
    files_read,
    open_split,
)
from qpenet_jax.runs.networks import network
from qpenet_jax.training.optimizer import Optimizer
from qpenet_jax.training.recipes import resolved
from qpenet_jax.training.sharding import shardings
from qpenet_jax.training.step import TrainState, init_state, make_train_step

# What a run may change when it is resumed or moved, as no result depends on it: of the
# paths, the contents are compared.
PATHS = (
    "dataset.root",
    "dataset.images",
    "dataset.masks",
    "dataset.train_ids",
    "dataset.val_ids",
    "backbone.weights",
)
BELOW_ROOT = ("dataset.images", "dataset.masks")
FREE = {
    "workers",
    "log_every",
    "save_every",
    "keep_compilations",
    "retries_on_nan",  # a run that has used one tells it in its results
    *PATHS,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes; nothing is read before it is asked for."""

    config: Any  # an ml_collections.ConfigDict as config.default_config makes it

    def __post_init__(self):
        """Fills in the recipe's values; refuse values that could only fail later."""
        refuse_64_bits()
        check_fields(self.config)
        config = resolved(self.config)
        object.__setattr__(self, "config", config)
        for name in set(PATHS) - set(BELOW_ROOT):
            section, field = name.split(".")
            if given := config[section][field]:
                config[section][field] = str(local_path(given))
        check(config)
        _ = self.backbone, self.model, self.optimizer

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the data set."""
        return class_names(self.config.dataset)

    @functools.cached_property
    def fold(self) -> Fold:
        """Base and novel class ids."""
        return chosen_fold(self.config.dataset, self.class_names)

    def dataset(self, split: Literal["train", "val"]) -> SegmentationDataset:
        """Returns the images of a split; raises InputError where files are missing."""
        data, seed = self.config.dataset, self.config.seed
        return open_split(data, split, self.class_names, seed)

    def train_sampler(self, dataset: SegmentationDataset) -> EpisodeSampler:
        """Returns the training episodes: base classes."""
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
            order=data.order,
            targets=data.targets,
            class_names=self.class_names,
        )

    def protocol(self, preset: str | None = None, **changes: Any) -> Protocol:
        """Returns how this experiment is evaluated: novel classes of the val split.

        The preset is the config's, with the config's changes, unless one is given;
        what the run itself settles (data, shots, training list) is never the preset's.
        Raises InputError where the fold or a class of the focus doesn't exist.
        """
        config, data = self.config, self.config.dataset
        novel = self.names(self.fold.novel)
        unknown = sorted(set(config.eval.focus) - set(novel))
        if unknown:
            raise InputError(
                f"config.eval.focus names {', '.join(unknown)}, not novel in "
                f"fold {data.fold}: choose of {', '.join(novel)}"
            )
        fields: dict[str, Any] = {
            "dataset": data.name,
            "split": data.split,
            "fold": data.fold,
            "classes": novel,
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
        return Protocol(**fields)

    @property
    def selections(self) -> tuple[str, ...]:
        """How checkpoints are chosen: the first is the result's, others come beside."""
        return selections(self.config)

    def selection_protocols(self) -> dict[str, Protocol]:
        """Returns how checkpoints are scored while training, by selection."""
        base = self.names(self.fold.base), self.config.eval.base_episodes
        protocols = {
            "base": self.protocol(preset="ours", classes=base[0], episodes=base[1]),
            "novel": self.protocol(),
        }
        return {name: protocols[name] for name in self.selections if name in protocols}

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read: nothing may be written into them."""
        weights = self.config.backbone.weights
        own = [Path(weights)] if weights else []
        return [*own, *files_read(self.config.dataset)]

    @property
    def dtype(self) -> str:
        """What the networks compute in on the device that is here, one of DTYPES."""
        return meant(self.config.dtype)

    @property
    def identity(self) -> str:
        """A hash of all that this experiment's results depend on."""
        fields = flat(json.loads(self.config.to_json()))
        text = json.dumps({k: v for k, v in fields.items() if k not in FREE})
        return hashlib.sha256(text.encode()).hexdigest()

    def names(self, class_ids: Sequence[int]) -> tuple[str, ...]:
        """Returns the names of classes."""
        return tuple(self.class_names[c - 1] for c in class_ids)

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The frozen network, with those of its stages that QPENet is given."""
        net = backbone(self.config.backbone.name)
        stages = tuple(self.config.backbone.stages)
        return choose_stages(net, stages) if stages else net

    def backbone_weights(self) -> PyTree[Array]:
        """Reads the frozen weights onto the device."""
        spec = self.config.backbone
        return load_weights(
            spec.name,
            spec.weights or None,
            deep=self.is_released_network,
            norms=spec.drift,
        )

    @property
    def is_released_network(self) -> bool:
        """Whether it is the authors' released network instead of the paper's."""
        return self.config.variant == RELEASED

    @functools.cached_property
    def model(self) -> QPENet | ReleasedQPENet:
        """The network over the backbone's features.

        QPENet proper, a variant of it, or the released network.
        """
        return network(self.config, self.backbone)

    def network_name(self, shots: int) -> str:
        """Returns what tables call the network, with as many supports."""
        if not self.is_released_network:
            return "QPENet"
        return f"{behaves(self.config.behaviour, shots)} QPENet"

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser's settings."""
        return Optimizer(**self.config.optimizer)

    @property
    def augmentation(self) -> Augmentation:
        """The training augmentation."""
        return Augmentation(**self.config.augmentation)

    def steps(self, listed_images: int) -> int:
        """Returns the length of training in steps."""
        epoch = listed_images // self.config.batch_size
        steps = self.config.steps or self.config.epochs * epoch
        if steps < 1:
            raise InputError(
                f"{listed_images} images make no batch of {self.config.batch_size}: "
                "add images, or lower config.batch_size"
            )
        return steps

    def init(self, tx: optax.GradientTransformation) -> TrainState:
        """Returns the state at step 0."""
        key = jax.random.key(self.config.seed)
        return init_state(self.model, tx, channels=self.backbone.channels, key=key)

    def untrained(self) -> PyTree[Array]:
        """Returns the parameters that training starts from."""
        return self.init(optax.identity()).params

    def learned_like(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Returns shapes as checkpoints hold them: parameters, statistics if any.

        Nothing is computed, and what is restored by them lies on one device.
        """
        spec = self.config.backbone

        def learned():
            statistics = no_statistics(spec.name) if spec.drift else {}
            state = self.init(optax.identity())
            return dataclasses.replace(state, statistics=statistics).learned

        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            jax.eval_shape(learned),
        )

    def train_step(self, tx: optax.GradientTransformation, epoch: int = 1):
        """Returns the jitted train step, for a batch shared as `shardings` says.

        Batch norm drifts by the length of an `epoch` in steps, if the config says so.
        """
        computing = in_dtype(self.model, self.backbone, self.config.dtype)
        accumulate = self.config.accumulate
        _, split = shardings(self.config.batch_size, accumulate)
        weights = LossWeights(**self.config.loss)
        loss = released_loss if self.is_released_network else total_loss
        drift_epoch = max(epoch, 1) if self.config.backbone.drift else None
        return make_train_step(
            *computing,
            tx,
            weights,
            split.mesh,
            loss,
            drift_epoch,
            accumulate=accumulate,
        )

    def predictor(self, learned: PyTree[Array], weights: PyTree[Array]) -> Predictor:
        """Returns QPENet as it was trained over the frozen weights."""
        params, weights = settled(learned, weights)
        return qpenet_predictor(
            self.model, self.backbone, params, weights, self.config.dtype
        )

    def cosine_predictor(self, weights: PyTree[Array]) -> Predictor:
        """Returns the training-free baseline, on all stages: they serve it best."""
        whole = backbone(self.config.backbone.name)
        return cosine_predictor(whole, weights, self.config.dtype)

    def training_free_predictor(self, weights: PyTree[Array]) -> Predictor:
        """Returns what segments best without any training: method prototype."""
        whole = backbone(self.config.backbone.name)
        return self_support_predictor(whole, weights, self.config.dtype)

    def mean_predictor(
        self, learned: PyTree[Array], weights: PyTree[Array]
    ) -> Predictor:
        """Returns the mean of the network and of what needs no training.

        Raises InputError for the released network, which is made of other features.
        """
        if not isinstance(self.model, QPENet):
            raise InputError(
                f"config.variant={RELEASED!r} has no mean with self-support: "
                "choose a run of another variant"
            )
        params, weights = settled(learned, weights)
        known = backbone(self.config.backbone.name).stages
        others = [stage for stage in known if stage not in self.backbone.stages]
        return mean_predictor(
            self.model, self.backbone, params, weights, others, self.config.dtype
        )
