"""Scores a run's parameters, and what they are compared with, by one protocol."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree, UInt8

from qpenet_jax.backbones.precision import resolve_dtype
from qpenet_jax.config import SELECTION, selections
from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episode_lists import EpisodeList
from qpenet_jax.evaluation.metrics import (
    Scores,
    estimate_difference,
    load_scores,
    mean_iou,
)
from qpenet_jax.evaluation.pictures import episode_figure, save_image
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.evaluation.protocols import Protocol, of_dataset
from qpenet_jax.evaluation.report import (
    RESULTS,
    SHEET,
    TABLE,
    summarize,
    table,
    write_json,
    write_report,
)
from qpenet_jax.evaluation.scoring import Samplers, score_episodes
from qpenet_jax.runs import build
from qpenet_jax.runs.datasets import (
    build_eval_samplers,
    build_fold,
    build_protocol,
    class_names,
)
from qpenet_jax.runs.folder import read_json

REFERENCES = "references.json"
FIGURE = "episodes.png"
FIGURE_EPISODES = 8

EPISODES = {name: f"episodes_{name}.csv" for name in ("qpenet", "untrained", "cosine")}
"""Files with the pixel counts of every episode, by the predictor that is scored."""


def folder_name(protocol: Protocol, episodes: EpisodeList | None = None) -> str:
    """Returns a name of its own for every protocol, such as pfenet_1shot.

    A list of `episodes` replaces what the protocol would choose, and is part of the
    name.
    """
    if episodes:
        protocol = dataclasses.replace(protocol, **episodes.fields)
    name = protocol.name.replace(", but ", "_").replace(" ", "_")
    return f"{name}_{protocol.shots}shot"


class ScoredEpisodes(NamedTuple):
    """What a protocol scores on a data set.

    Only classes that some episode can show are among the protocol's and `class_ids`:
    others would count as 0 in every mean. `left_out` are their names.
    """

    protocol: Protocol
    samplers: Samplers
    class_ids: tuple[int, ...]
    left_out: list[str]


def scored_episodes(
    config: Any,
    val: SegmentationDataset,
    protocol: Protocol,
    episodes: EpisodeList | None = None,
) -> ScoredEpisodes:
    """Returns a protocol's episodes, or those of a list.

    Raises:
        InputError: the data set can't serve the protocol, or the list shows a class
            that the run trains on.
    """
    protocol, names = of_dataset(protocol, val), class_names(config)
    if episodes:
        protocol = dataclasses.replace(protocol, **episodes.fields)
    own = build_eval_samplers(config, val, protocol, drop_few=bool(episodes))
    samplers = episodes.samplers if episodes else own
    shown = {c for sampler in samplers for c in sampler.shown}
    if episodes and (others := shown - set(build_fold(config).novel)):
        raise InputError(
            f"the episode list shows {names[min(others) - 1]}, which isn't novel in "
            f"fold {config.dataset.fold}: give a list of this fold"
        )
    class_ids = tuple(sorted(shown.union(own[0].shown)))
    classes = tuple(names[class_id - 1] for class_id in class_ids)
    left_out = sorted(set(protocol.classes) - set(classes))
    protocol = dataclasses.replace(protocol, classes=classes)
    return ScoredEpisodes(protocol, samplers, class_ids, left_out)


class Evaluator:
    """Scores a run's parameters by one protocol and writes into a folder.

    `episodes_<name>.csv` holds the pixel counts of every episode, `results.*` the last
    evaluation of the trained network beside its references, `episodes.png` the first
    episodes.
    """

    def __init__(
        self,
        config: Any,
        weights: PyTree[Array],
        folder: Path,
        val: SegmentationDataset,
        protocol: Protocol | None = None,
        episodes: EpisodeList | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ):
        """Chooses the episodes, by default of the config's protocol.

        `weights` are the backbone's; `stop_asked` says whether to give an evaluation
        up. Nothing is written yet.
        """
        self.config, self.weights = config, one_copy(weights)
        self.folder, self.val, self.stop_asked = folder, val, stop_asked
        self.selection = selections(config)[0]
        protocol = protocol or build_protocol(config)
        scored = scored_episodes(config, val, protocol, episodes)
        self.protocol, self.samplers, self.class_ids, self.left_out = scored

    def of_selection(self, name: str) -> "Evaluator":
        """Returns this evaluator for another selection's checkpoint, and its folder."""
        other = copy.copy(self)
        other.selection, other.folder = name, self.folder / f"selected_on_{name}"
        return other

    @property
    def files(self) -> list[Path]:
        """All files that are written."""
        names = (RESULTS, TABLE, SHEET, REFERENCES, FIGURE, *EPISODES.values())
        return [self.folder / name for name in names]

    def describe(self) -> str:
        """Returns the protocol, and which classes have too few images for it."""
        lines = [f"protocol: {self.protocol}"]
        if self.left_out:
            shots = self.protocol.shots
            names = ", ".join(self.left_out)
            lines.append(f"left out, too few images for {shots} shot(s): {names}")
        return "\n".join(lines)

    def miou(self, params: PyTree[Array]) -> float:
        """Returns the mIoU of parameters in percent; nothing is written."""
        scores = self._evaluate("selection", self._predictor(params))
        return 100 * mean_iou(scores, self.class_ids)

    def references(self) -> str:
        """Scores the untrained network and the baseline; returns them as a table."""
        untrained = self._predictor(build.initial_params(self.config))
        predictors = {"untrained": untrained, "cosine": self._cosine}
        found = {name: self._score(name, each) for name, each in predictors.items()}
        made = {"run": build.identity(self.config), "results": found}
        if cluster.is_first():
            write_json(self.folder / REFERENCES, made)
        return table(found)

    def score(self, params: PyTree[Array], **facts: Any) -> dict[str, Any]:
        """Scores the network, writes its episodes and a figure, returns the results.

        `facts` are added to the results: `step`, that of the checkpoint, and `shared`,
        what a warning says of images that were trained on and are scored. Of several
        processes only the first has the whole results.
        """
        predict = self._predictor(params)
        results = self._score("qpenet", predict) | facts
        if not cluster.is_first():
            return results
        config, references = self.config, self._references()
        network = build.network_name(config, self.protocol.shots)
        results |= {
            "network": network,
            "dtype": resolve_dtype(config.dtype),
            "device": jax.devices()[0].device_kind,
            "config_hash": build.identity(config)[:12],
            "class_ids": list(self.class_ids),
            "selection": SELECTION[self.selection],
            "references": references,
        }
        if "cosine" in references:
            results["gain_over_cosine"] = self._gain_over_cosine()
        figure = self._figure({"cosine": self._cosine, network: predict})
        save_image(figure, self.folder / FIGURE)
        return results

    def write(self, results: dict[str, Any]) -> None:
        """Writes the results: with them an evaluation is complete."""
        if cluster.is_first():
            write_report(self.folder, results)

    def step(self) -> int | None:
        """Returns the step of the last written results of this protocol, if any."""
        results = cluster.by_first(lambda: self._read(RESULTS))
        same = results.get("protocol") == self.protocol.to_dict()
        return results.get("step") if same else None

    def report(self) -> str:
        """Returns the last results as text: the table beside their references."""
        return cluster.by_first(lambda: (self.folder / TABLE).read_text("utf-8"))

    def _predictor(self, params: PyTree[Array]) -> Predictor:
        return build.build_predictor(self.config, one_copy(params), self.weights)

    @functools.cached_property
    def _cosine(self) -> Predictor:
        """The training-free baseline over the same backbone."""
        return build.build_cosine_predictor(self.config, self.weights)

    def _evaluate(self, name: str, predict: Predictor) -> Scores:
        return score_episodes(
            predict,
            self.val,
            self.protocol,
            self.samplers,
            workers=self.config.workers,
            stop_asked=self.stop_asked,
            label=f"evaluating {name}",
        )

    def _score(self, name: str, predict: Predictor) -> dict[str, Any]:
        scores = self._evaluate(name, predict)
        if cluster.is_first():
            scores.save(self.folder / EPISODES[name])
        return summarize(scores, self.protocol, self.class_ids, [*self._subset])

    @property
    def _subset(self) -> dict[str, int]:
        """The classes of `config.eval.subset` that some episode can show; their ids."""
        ids = dict(zip(self.protocol.classes, self.class_ids, strict=True))
        return {name: ids[name] for name in self.config.eval.subset if name in ids}

    def _references(self) -> dict[str, Any]:
        """Returns the results of `references`, if they are of this run and protocol."""
        made, protocol = self._read(REFERENCES), self.protocol.to_dict()
        if made.get("run") != build.identity(self.config):
            return {}
        found = made["results"]
        same = all(reference["protocol"] == protocol for reference in found.values())
        return found if same else {}

    def _gain_over_cosine(self) -> dict[str, list[float]]:
        """Returns paired mIoU differences with their intervals, in points."""
        network, cosine = (
            load_scores(self.folder / EPISODES[name]) for name in ("qpenet", "cosine")
        )
        classes = {"mIoU": self.class_ids}
        if subset := self._subset:
            classes["mean of " + ", ".join(subset)] = tuple(subset.values())
        found = {
            what: estimate_difference(network, cosine, ids).miou
            for what, ids in classes.items()
        }
        return {what: miou.percent() for what, miou in found.items()}

    def _figure(self, predictors: dict[str, Predictor]) -> UInt8[Any, "h w 3"]:
        """Draws the first episodes with what the predictors find in them."""
        protocol, draw = self.protocol, self.samplers[0]
        episodes = [draw(i) for i in range(min(FIGURE_EPISODES, protocol.episodes))]
        size = protocol.side, protocol.resize
        return episode_figure(self.val, episodes, predictors, *size)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}


def one_copy(tree: Any) -> Any:
    """Returns the copies on this process' first device, of arrays on all devices."""

    def first(leaf):
        shared = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if shared else leaf

    return jax.tree.map(first, tree)
