"""Scores parameters of an experiment, and what they are compared with."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree, UInt8
from PIL import Image

from qpenet_jax.evaluation import (
    Protocol,
    evaluate,
    summarize,
    table,
    write_json,
)
from qpenet_jax.experiment import Experiment
from qpenet_jax.metrics import Scores, load_scores, paired_difference
from qpenet_jax.typing import Episode
from qpenet_jax.visualize import episode_figure

RESULTS = "results.json"
REFERENCES = "references.json"
FIGURE = "episodes.png"
FIGURE_EPISODES = 8


class Evaluator:
    """Evaluates by one protocol and writes what it finds into a folder.

    `episodes_<name>.csv` holds the pixel counts of every episode, `results.json` the
    last evaluation of the trained network beside its references, `episodes.png` the
    first episodes.
    """

    def __init__(
        self,
        experiment: Experiment,
        weights: PyTree[Array],
        folder: Path,
        protocol: Protocol | None = None,
    ):
        """Read the val split; raises InputError where it can't serve the protocol."""
        self.experiment, self.folder = experiment, folder
        self.protocol = protocol or experiment.protocol()
        self.val = experiment.dataset("val")
        self.samplers = experiment.eval_samplers(self.val, self.protocol)
        self.class_ids = self._scorable_classes()
        names = tuple(experiment.class_names[c - 1] for c in self.class_ids)
        for name in set(self.protocol.classes) - set(names):
            print(f"{name}: too few images for {self.protocol.shots} shot(s), left out")
        self.protocol = dataclasses.replace(self.protocol, classes=names)
        self.focus = [name for name in experiment.config.eval.focus if name in names]
        self.predict = experiment.predictor(weights)
        self.cosine = experiment.cosine_predictor(weights)

    def _scorable_classes(self) -> tuple[int, ...]:
        """Return the novel classes which some episode can show.

        The others would count as 0 in every mean.
        """
        shown = np.flatnonzero(self.samplers[0].pairs.any(axis=0))
        return tuple(c for i, c in enumerate(self.experiment.fold.novel) if i in shown)

    def references(self) -> str:
        """Score the untrained network and the training-free baseline; tabulate."""
        initial = self.experiment.untrained()
        found = {
            "untrained": self._score("untrained", lambda b: self.predict(initial, b)),
            "cosine": self._score("cosine", self.cosine),
        }
        write_json(self.folder / REFERENCES, found)
        return table(found)

    def __call__(
        self, params: PyTree[Array], **facts: Any
    ) -> tuple[dict[str, Any], UInt8[np.ndarray, "h w 3"]]:
        """Score the network; write and return the results and a figure."""

        def predict(batch: Episode) -> Array:
            return self.predict(params, batch)

        results = self._score("qpenet", predict) | facts
        # References of another protocol (an earlier call) compare to nothing here.
        found, ours = self._read(REFERENCES), self.protocol.to_dict()
        same = all(reference["protocol"] == ours for reference in found.values())
        results["references"] = found if same else {}
        if "cosine" in results["references"]:
            results["gain_over_cosine"] = self._gain("cosine")
        write_json(self.folder / RESULTS, results)
        figure = episode_figure(
            self.val,
            [self.samplers[0](i) for i in range(FIGURE_EPISODES)],
            {"cosine": self.cosine, "QPENet": predict},
            self.protocol.side,
        )
        Image.fromarray(figure).save(self.folder / FIGURE)
        return results, figure

    def report(self) -> str:
        """Return the last results as a table beside their references."""
        results = self._read(RESULTS)
        lines = ["", table({**results["references"], "QPENet": results})]
        for what, (value, low, high) in results.get("gain_over_cosine", {}).items():
            lines.append(
                f"gain over cosine, {what}: {value:+.1f} [{low:+.1f}, {high:+.1f}]"
            )
        lines.append("in brackets: 95 % bootstrap intervals over query images")
        return "\n".join(lines)

    def _score(self, name: str, predict: Callable[[Episode], Array]) -> dict[str, Any]:
        start = time.perf_counter()
        scores = evaluate(
            predict,
            self.val,
            self.protocol,
            self.samplers,
            workers=self.experiment.config.workers,
            label=f"evaluating {name}",
        )
        seconds = time.perf_counter() - start
        scores.save(self._episodes(name))
        return summarize(scores, self.protocol, self.class_ids, seconds, self.focus)

    def _gain(self, reference: str) -> dict[str, list[float]]:
        """Return paired mIoU differences with their intervals, in points."""
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
        return json.loads(path.read_text()) if path.exists() else {}
