"""Scores a run's parameters, and what they are compared with, by one protocol."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, PyTree, UInt8

from qpenet_jax.config import SELECTION
from qpenet_jax.core import cluster
from qpenet_jax.core.types import SegmentationDataset
from qpenet_jax.data.episode_lists import EpisodeList
from qpenet_jax.evaluation.metrics import (
    Scores,
    load_scores,
    mean_iou,
    paired_difference,
)
from qpenet_jax.evaluation.pictures import episode_figure, save_image
from qpenet_jax.evaluation.predictor import Predictor
from qpenet_jax.evaluation.protocols import Protocol
from qpenet_jax.evaluation.report import (
    RESULTS,
    SHEET,
    TABLE,
    summarize,
    table,
    write_json,
    write_report,
)
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.runs.drawn import draw
from qpenet_jax.runs.experiment import Experiment
from qpenet_jax.training.sharding import one_copy

REFERENCES = "references.json"
FIGURE = "episodes.png"
FIGURE_EPISODES = 8


class Evaluator:
    """Scores a run's parameters by one protocol and writes into a folder.

    `episodes_<name>.csv` holds the pixel counts of every episode, `results.*` the last
    evaluation of the trained network beside its references, `episodes.png` the first
    episodes.
    """

    def __init__(
        self,
        experiment: Experiment,
        weights: PyTree[Array],
        folder: Path,
        val: SegmentationDataset,
        protocol: Protocol | None = None,
        episodes: EpisodeList | None = None,
    ):
        """Draws the episodes, by default of the experiment's own protocol; see `draw`.

        `weights` are the backbone's. Nothing is written yet.
        """
        self.experiment, self.weights = experiment, one_copy(weights)
        self.folder, self.val = folder, val
        self.selection = experiment.selections[0]
        drawn = draw(experiment, val, protocol or experiment.protocol(), episodes)
        self.protocol, self.samplers, self.class_ids, self.left_out = drawn

    @functools.cached_property
    def cosine(self) -> Predictor:
        """The training-free baseline over the same backbone."""
        return self.experiment.cosine_predictor(self.weights)

    @property
    def focus(self) -> list[str]:
        """Those classes of `config.eval.focus` that some episode can show."""
        names = self.experiment.config.eval.focus
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
        predict = self.experiment.predictor(one_copy(params), self.weights)
        scores = self._evaluate("selection", predict)
        return 100 * mean_iou(scores, self.class_ids)

    def references(self) -> str:
        """Scores the untrained network and the baseline; return them as a table."""
        initial = self.experiment.untrained()
        untrained = self.experiment.predictor(initial, self.weights)
        found = {
            "untrained": self._score("untrained", untrained),
            "cosine": self._score("cosine", self.cosine),
        }
        made = {"run": self.experiment.identity, "results": found}
        if cluster.is_first():
            write_json(self.folder / REFERENCES, made)
        return table(found)

    def __call__(
        self,
        params: PyTree[Array],
        tell: Callable[[dict[str, Any], Path], None] | None = None,
        **facts: Any,
    ) -> None:
        """Scores the network; write the results and a figure.

        `facts` are added to the results: `step`, that of the checkpoint, and `shared`,
        what a warning says of images that were trained on and are scored. Others are
        told of results and figure by `tell`, before the file of the results says that
        all is done.
        """
        predict = self.experiment.predictor(one_copy(params), self.weights)
        results = self._score("qpenet", predict) | facts
        if not cluster.is_first():
            return
        results["network"] = self.experiment.network_name(self.protocol.shots)
        results["dtype"] = self.experiment.dtype
        results["device"] = jax.devices()[0].device_kind
        results["config_hash"] = self.experiment.identity[:12]
        results["class_ids"] = list(self.class_ids)
        results["selection"] = SELECTION[self.selection]
        results["references"] = self._references()
        if "cosine" in results["references"]:
            results["gain_over_cosine"] = self._gain("cosine")
        figure = self.folder / FIGURE
        save_image(self._figure(predict), figure)
        if tell is not None:
            tell(results, figure)
        write_report(self.folder, results)  # last: it says that all is done

    def _references(self) -> dict[str, Any]:
        """Returns what `references` found; nothing if for another run or protocol."""
        made, ours = self._read(REFERENCES), self.protocol.to_dict()
        if made.get("run") != self.experiment.identity:
            return {}
        found = made["results"]
        same = all(reference["protocol"] == ours for reference in found.values())
        return found if same else {}

    def step(self) -> int | None:
        """Returns the step of the last written results of this protocol, if any."""
        return cluster.by_first(self._step, "written")

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
                "cosine": self.cosine.as_scored,
                self.experiment.network_name(self.protocol.shots): predict.as_scored,
            },
            self.protocol.side,
            self.protocol.resize,
        )

    def _evaluate(self, name: str, predict: Predictor) -> Scores:
        return score_episodes(
            predict,
            self.val,
            self.protocol,
            self.samplers,
            workers=self.experiment.config.workers,
            label=f"evaluating {name}",
        )

    def _score(self, name: str, predict: Predictor) -> dict[str, Any]:
        scores = self._evaluate(name, predict)
        if cluster.is_first():
            scores.save(self._episodes(name))
        return summarize(scores, self.protocol, self.class_ids, self.focus)

    def _gain(self, reference: str) -> dict[str, list[float]]:
        """Returns paired mIoU differences with their intervals, in points."""
        ours, theirs = self._scores("qpenet"), self._scores(reference)
        names = self.protocol.classes
        classes = {"mIoU": self.class_ids}
        if self.focus:
            chosen = tuple(self.class_ids[names.index(name)] for name in self.focus)
            classes["mean of " + ", ".join(self.focus)] = chosen
        return {
            what: [round(100 * v, 2) for v in paired_difference(ours, theirs, ids)]
            for what, ids in classes.items()
        }

    def _episodes(self, name: str) -> Path:
        return self.folder / f"episodes_{name}.csv"

    def _scores(self, name: str) -> Scores:
        return load_scores(self._episodes(name))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
