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


def folder_name(protocol: Protocol, episodes: EpisodeList | None = None) -> str:
    """Returns a name of its own for every protocol, such as pfenet_1shot.

    A list of `episodes` replaces what the protocol would choose, and is part of the
    name.
    """
    protocol = _with_list(protocol, episodes)
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
    if episodes:
        _check_novel(config, episodes)
    protocol = _with_list(of_dataset(protocol, val), episodes)
    own = build_eval_samplers(config, val, protocol, drop_few=bool(episodes))
    samplers = episodes.samplers if episodes else own
    shown = {c for sampler in (own[0], *samplers) for c in sampler.shown}
    class_ids = tuple(sorted(shown))
    names = tuple(class_names(config)[class_id - 1] for class_id in class_ids)
    left_out = sorted(set(protocol.classes) - set(names))
    protocol = dataclasses.replace(protocol, classes=names)
    return ScoredEpisodes(protocol, samplers, class_ids, left_out)


def _with_list(protocol: Protocol, episodes: EpisodeList | None) -> Protocol:
    return dataclasses.replace(protocol, **episodes.fields) if episodes else protocol


def _check_novel(config: Any, episodes: EpisodeList) -> None:
    """Refuses a list with classes that the run trains on."""
    shown = {c for sampler in episodes.samplers for c in sampler.shown}
    for class_id in sorted(shown - set(build_fold(config).novel)):
        raise InputError(
            f"the episode list shows {class_names(config)[class_id - 1]}, which isn't "
            f"novel in fold {config.dataset.fold}: give a list of this fold"
        )


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

    @functools.cached_property
    def cosine(self) -> Predictor:
        """The training-free baseline over the same backbone."""
        return build.build_cosine_predictor(self.config, self.weights)

    @property
    def subset(self) -> list[str]:
        """Those classes of `config.eval.subset` that some episode can show."""
        names = self.config.eval.subset
        return [name for name in names if name in self.protocol.classes]

    def of_selection(self, name: str) -> "Evaluator":
        """Returns this evaluator for another selection's checkpoint, and its folder."""
        other = copy.copy(self)
        other.selection, other.folder = name, self.folder / f"selected_on_{name}"
        return other

    @property
    def files(self) -> list[Path]:
        """All files that are written."""
        names = [RESULTS, TABLE, SHEET, REFERENCES, FIGURE]
        scored = [self._episodes(name) for name in ("qpenet", "untrained", "cosine")]
        return [*(self.folder / name for name in names), *scored]

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
        predict = self._predictor(params)
        scores = self._evaluate("selection", predict)
        return 100 * mean_iou(scores, self.class_ids)

    def references(self) -> str:
        """Scores the untrained network and the baseline; returns them as a table."""
        untrained = self._predictor(build.initial_params(self.config))
        found = {
            "untrained": self._score("untrained", untrained),
            "cosine": self._score("cosine", self.cosine),
        }
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
        results["network"] = build.network_name(self.config, self.protocol.shots)
        results["dtype"] = resolve_dtype(self.config.dtype)
        results["device"] = jax.devices()[0].device_kind
        results["config_hash"] = build.identity(self.config)[:12]
        results["class_ids"] = list(self.class_ids)
        results["selection"] = SELECTION[self.selection]
        results["references"] = self._references()
        if "cosine" in results["references"]:
            results["gain_over_cosine"] = self._gain("cosine")
        save_image(self._figure(predict), self.folder / FIGURE)
        return results

    def write(self, results: dict[str, Any]) -> None:
        """Writes the results: with them an evaluation is complete."""
        if cluster.is_first():
            write_report(self.folder, results)

    def _references(self) -> dict[str, Any]:
        """Returns the results of `references`, if they are of this run and protocol."""
        made, ours = self._read(REFERENCES), self.protocol.to_dict()
        if made.get("run") != build.identity(self.config):
            return {}
        found = made["results"]
        same = all(reference["protocol"] == ours for reference in found.values())
        return found if same else {}

    def step(self) -> int | None:
        """Returns the step of the last written results of this protocol, if any."""
        return cluster.by_first(self._step)

    def _step(self) -> int | None:
        results = self._read(RESULTS)
        same = results.get("protocol") == self.protocol.to_dict()
        return results.get("step") if same else None

    def report(self) -> str:
        """Returns the last results as text: the table beside their references.

        Of several processes only the first, which has written them, knows it.
        """
        if not cluster.is_first():
            return ""
        return (self.folder / TABLE).read_text(encoding="utf-8")

    def _figure(self, predict: Predictor) -> UInt8[Any, "h w 3"]:
        """Draws the first episodes with the baseline's and the network's prediction."""
        count = min(FIGURE_EPISODES, self.protocol.episodes)
        return episode_figure(
            self.val,
            [self.samplers[0](i) for i in range(count)],
            {
                "cosine": self.cosine,
                build.network_name(self.config, self.protocol.shots): predict,
            },
            self.protocol.side,
            self.protocol.resize,
        )

    def _predictor(self, params: PyTree[Array]) -> Predictor:
        return build.build_predictor(self.config, one_copy(params), self.weights)

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
            scores.save(self._episodes(name))
        return summarize(scores, self.protocol, self.class_ids, self.subset)

    def _gain(self, reference: str) -> dict[str, list[float]]:
        """Returns paired mIoU differences with their intervals, in points."""
        ours, theirs = self._scores("qpenet"), self._scores(reference)
        names = self.protocol.classes
        classes = {"mIoU": self.class_ids}
        if self.subset:
            chosen = tuple(self.class_ids[names.index(name)] for name in self.subset)
            classes["mean of " + ", ".join(self.subset)] = chosen
        return {
            what: [
                round(100 * v, 2) for v in estimate_difference(ours, theirs, ids).miou
            ]
            for what, ids in classes.items()
        }

    def _episodes(self, name: str) -> Path:
        return self.folder / f"episodes_{name}.csv"

    def _scores(self, name: str) -> Scores:
        return load_scores(self._episodes(name))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}


def one_copy(tree: Any) -> Any:
    """Returns the copies on this process' first device, of arrays on all devices."""

    def first(leaf):
        shared = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return leaf.addressable_data(0) if shared else leaf

    return jax.tree.map(first, tree)
