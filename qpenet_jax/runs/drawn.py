"""Which episodes score an experiment: drawn by a protocol, or those of a list."""

import dataclasses
from typing import NamedTuple

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episode_lists import EpisodeList
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.evaluation.protocols import Protocol, of_dataset
from qpenet_jax.evaluation.scoring import Samplers
from qpenet_jax.runs.experiment import Experiment


def folder_name(protocol: Protocol, episodes: EpisodeList | None = None) -> str:
    """Returns a name of its own for every protocol, such as pfenet_1shot.

    A list of `episodes` replaces what the protocol would draw, and is part of the name.
    """
    protocol = _with_list(protocol, episodes)
    name = protocol.name.replace(", but ", "_").replace(" ", "_")
    return f"{name}_{protocol.shots}shot"


def _with_list(protocol: Protocol, episodes: EpisodeList | None) -> Protocol:
    return dataclasses.replace(protocol, **episodes.fields) if episodes else protocol


class Drawn(NamedTuple):
    """What a protocol scores on a data set.

    Only classes that some episode can show are among the protocol's and `class_ids`:
    others would count as 0 in every mean. `left_out` are their names.
    """

    protocol: Protocol
    samplers: Samplers
    class_ids: tuple[int, ...]
    left_out: list[str]


def draw(
    experiment: Experiment,
    val: SegmentationDataset,
    protocol: Protocol,
    episodes: EpisodeList | None = None,
) -> Drawn:
    """Draws a protocol's episodes, or take those of a list.

    Raises:
        InputError: the data set can't serve the protocol, or the list shows a class
            that the experiment trains on.
    """
    if episodes:
        _check_novel(experiment, episodes)
    protocol = _with_list(of_dataset(protocol, val), episodes)
    drawn = eval_samplers(experiment, val, protocol, drop_few=bool(episodes))
    samplers = episodes.samplers if episodes else drawn
    shown = {c for sampler in (drawn[0], *samplers) for c in sampler.shown}
    class_ids = tuple(sorted(shown))
    names = tuple(experiment.class_names[class_id - 1] for class_id in class_ids)
    left_out = sorted(set(protocol.classes) - set(names))
    protocol = dataclasses.replace(protocol, classes=names)
    return Drawn(protocol, samplers, class_ids, left_out)


def eval_samplers(
    experiment: Experiment,
    dataset: SegmentationDataset,
    protocol: Protocol,
    drop_few: bool = False,
) -> list[EpisodeSampler]:
    """Returns the protocol's episodes, one sampler a seed.

    Images for base classes, when the protocol names those, show no novel class; base
    classes with too few images are left out, novel ones if `drop_few`.
    """
    names, fold = experiment.class_names, experiment.fold
    base = protocol.classes == experiment.names(fold.base)
    on_few = experiment.config.dataset.on_few
    return [
        EpisodeSampler(
            dataset.counts,
            tuple(names.index(name) + 1 for name in protocol.classes),
            protocol.shots,
            seed,
            exclude=fold.novel if base else (),
            min_pixels=protocol.min_pixels,
            on_few="drop" if base or drop_few else on_few,
            order=protocol.order,
            targets=protocol.targets,
            class_names=names,
        )
        for seed in protocol.seeds
    ]


def _check_novel(experiment: Experiment, episodes: EpisodeList) -> None:
    """Refuses a list with classes that the experiment trains on."""
    names, fold = experiment.class_names, experiment.config.dataset.fold
    shown = {c for sampler in episodes.samplers for c in sampler.shown}
    for class_id in sorted(shown - set(experiment.fold.novel)):
        raise InputError(
            f"the episode list shows {names[class_id - 1]}, which isn't novel in fold "
            f"{fold}: give a list of this fold"
        )
