"""From a config to its classes, fold, images and episodes."""

from pathlib import Path
from typing import Any, Literal

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.folds import (
    COCO_CLASSES,
    PASCAL_CLASSES,
    Fold,
    coco_fold,
    fold_of,
    named_fold,
    pascal_fold,
)
from qpenet_jax.data.sources.prepared import Prepared, read_metadata
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.evaluation.protocols import PRESETS, Protocol, preset_fields


def class_names(config: Any) -> tuple[str, ...]:
    """Returns the names of all classes of the data set.

    Raises:
        InputError: they are a prepared data set's, and there is none.
    """
    data = config.dataset
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
    return tuple(read_metadata(data.root)["classes"])


def build_fold(config: Any) -> Fold:
    """Returns base and novel class ids by the config's split and fold.

    Raises:
        InputError: there is no such fold, or a novel class isn't in the data set.
    """
    data = config.dataset
    if data.split == "pascal":
        return pascal_fold(data.fold)
    if data.split.startswith("coco_"):
        return coco_fold(data.fold, data.split.removeprefix("coco_"))
    if data.split == "named":
        return named_fold(class_names(config), tuple(data.novel))
    return fold_of(len(class_names(config)), data.fold, data.folds, data.split)


def fold_names(config: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the base and of the novel classes."""
    names, fold = class_names(config), build_fold(config)
    base, novel = (tuple(names[c - 1] for c in ids) for ids in (fold.base, fold.novel))
    return base, novel


def build_dataset(config: Any, split: Literal["train", "val"]) -> SegmentationDataset:
    """Returns the images of a split; the config's seed decides what shapes show.

    Raises:
        InputError: files are missing, or a prepared data set has other classes.
    """
    data, classes = config.dataset, class_names(config)
    # pyright takes a cached_property for no match of a protocol's property.
    dataset: Any
    if data.kind == "shapes":
        dataset = Shapes(split, data[f"{split}_images"], data.side, config.seed)
    elif data.kind == "voc":
        ids = data[f"{split}_ids"]
        dataset = VOCLayout(data.root, ids, classes, data.images, data.masks)
    else:
        dataset = Prepared(data.root, split)
        if dataset.classes != classes:
            raise InputError(
                f"{data.root} has {len(dataset.classes)} other classes than "
                f"config.dataset.split={data.split!r} expects; choose "
                "'blocks', 'strided' or 'named'"
            )
    return dataset


def files_read(config: Any) -> list[Path]:
    """Returns the files and folders that are read: nothing may be written there."""
    data, weights = config.dataset, config.backbone.weights
    found = [Path(weights)] if weights else []
    if data.kind == "shapes":
        return found
    root = Path(data.root)
    if data.kind == "prepared":
        return [*found, root]
    lists = [Path(ids) for ids in (data.train_ids, data.val_ids) if ids]
    return [*found, root / data.images, root / data.masks, *lists]


def build_train_sampler(config: Any, dataset: SegmentationDataset) -> EpisodeSampler:
    """Returns the sampler of training episodes, which show base classes."""
    data, fold = config.dataset, build_fold(config)
    if not fold.base:
        raise InputError(
            "there is no base class to train on: config.dataset.novel names all"
        )
    return EpisodeSampler(
        dataset.counts,
        fold.base,
        config.shots,
        config.seed,
        exclude=fold.novel if data.exclude_novel else (),
        min_pixels=data.min_pixels,
        on_few=data.on_few,
        order=data.order,
        targets=data.targets,
        class_names=class_names(config),
    )


def build_eval_samplers(
    config: Any,
    dataset: SegmentationDataset,
    protocol: Protocol,
    drop_few: bool = False,
) -> list[EpisodeSampler]:
    """Returns the protocol's episodes, one sampler a seed.

    Images for base classes, when the protocol names those, show no novel class; base
    classes with too few images are left out, novel ones if `drop_few`.
    """
    names, fold = class_names(config), build_fold(config)
    base = protocol.classes == fold_names(config)[0]
    return [
        EpisodeSampler(
            dataset.counts,
            tuple(names.index(name) + 1 for name in protocol.classes),
            protocol.shots,
            seed,
            exclude=fold.novel if base else (),
            min_pixels=protocol.min_pixels,
            on_few="drop" if base or drop_few else config.dataset.on_few,
            order=protocol.order,
            targets=protocol.targets,
            class_names=names,
        )
        for seed in protocol.seeds
    ]


def training_steps(config: Any, listed_images: int) -> int:
    """Returns the length of training in steps."""
    epoch = listed_images // config.batch_size
    steps = config.steps or config.epochs * epoch
    if steps < 1:
        raise InputError(
            f"{listed_images} images make no batch of {config.batch_size}: "
            "add images, or lower config.batch_size"
        )
    return steps


def build_protocol(config: Any, preset: str | None = None, **changes: Any) -> Protocol:
    """Returns how a run is evaluated: on novel classes of the val split.

    The preset is the config's, with the config's changes, unless one is given; what the
    run itself decides (data, shots, training list) is never the preset's. Raises
    InputError where the fold or a class of the subset doesn't exist.
    """
    data, (_, novel) = config.dataset, fold_names(config)
    unknown = sorted(set(config.eval.subset) - set(novel))
    if unknown:
        raise InputError(
            f"config.eval.subset names {', '.join(unknown)}, not novel in "
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
    return Protocol(**preset_fields(fields["preset"], data.split) | fields | changes)


def selection_protocols(
    config: Any, selections: tuple[str, ...]
) -> dict[str, Protocol]:
    """Returns how checkpoints are scored while training, by selection."""
    base, _ = fold_names(config)
    changes = {"classes": base, "episodes": config.eval.base_episodes}
    protocols = {
        "base": lambda: build_protocol(config, preset="default", **changes),
        "novel": lambda: build_protocol(config),
    }
    return {name: protocols[name]() for name in selections if name in protocols}
