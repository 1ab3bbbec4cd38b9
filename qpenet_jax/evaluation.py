"""One protocol object says how a number came about; all evaluation goes by it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from tqdm import tqdm

from qpenet_jax import metrics
from qpenet_jax.episodes import EpisodeSampler, evaluation_episodes
from qpenet_jax.errors import InputError
from qpenet_jax.metrics import Scores
from qpenet_jax.models.backbone import Backbone
from qpenet_jax.models.ops import interpolation_matrix
from qpenet_jax.training import episode_features
from qpenet_jax.transforms import content_size
from qpenet_jax.typing import Episode, SegmentationDataset

Scoring = Literal["original", "input", "exact"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What was measured and how: two results compare only if these are equal.

    `scoring` is the size at which pixels are counted. "original" follows PFENet and its
    descendants: logits stretched to a square of the query's longer side, which shifts
    them by some pixels; "exact" undoes the padding first; "input" counts on the padded
    network input, as QPENet's released test script does.
    """

    dataset: str
    fold: int
    classes: tuple[str, ...]
    shots: int = 1
    episodes: int = 1000
    seeds: tuple[int, ...] = (0,)
    side: int = 473
    scoring: Scoring = "original"
    min_pixels: int = 2048

    def __post_init__(self):
        """Refuse values that would score something else than they say."""
        if self.scoring not in get_args(Scoring):
            choices = ", ".join(get_args(Scoring))
            raise InputError(f"scoring {self.scoring!r}: choose {choices}")
        if self.episodes < 1 or not self.seeds or min(self.seeds) < 0:
            raise InputError(
                f"{self.episodes} episodes with seeds {list(self.seeds)}: give 1 "
                "episode or more, and seeds from 0 on"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the line as results.json holds them."""
        fields = dataclasses.asdict(self) | {"text": str(self)}
        return json.loads(json.dumps(fields))

    def __str__(self) -> str:
        """Return the one line that is printed with every result."""
        seeds = ",".join(map(str, self.seeds))
        return (
            f"{self.dataset} fold {self.fold}, {self.shots}-shot, "
            f"{self.episodes} episodes x seeds {seeds}, input {self.side}, "
            f"scored at {self.scoring} size, targets >= {self.min_pixels} px, "
            "255 ignored"
        )


def make_eval_step(
    forward: Callable[..., tuple[Float[Array, "b H W 2"], dict[str, Array]]],
    backbone: Backbone,
) -> Callable[[PyTree[Array], PyTree[Array], Episode], Float[Array, "b H W"]]:
    """Return `eval_step(params, weights, batch)`, jitted: foreground's lead in logits.

    `forward(params, support_features, support_masks, query_features)` is QPENet's
    apply or the training-free baseline; positive means foreground.
    """

    def eval_step(params, weights, batch):
        support_maps, query_maps = episode_features(backbone, weights, batch)
        logits, _ = forward(params, support_maps, batch.support_masks, query_maps)
        return logits[..., 1] - logits[..., 0]

    return jax.jit(eval_step)


def evaluate(
    predict: Callable[[Episode], Float[Array, "b H W"]],
    dataset: SegmentationDataset,
    protocol: Protocol,
    samplers: Sequence[EpisodeSampler],
    *,
    workers: int = 0,
    label: str = "evaluating",
) -> Scores:
    """Score `predict` on the protocol's episodes, one sampler a seed."""
    rows = []
    bar = tqdm(total=protocol.episodes * len(samplers), desc=label, unit="episode")
    with bar:
        for sampler in samplers:
            stream = evaluation_episodes(
                dataset, sampler, protocol.episodes, protocol.side, workers
            )
            for ids, episode, mask in stream:
                margin = predict(Episode(*(x[None] for x in episode)))[0]
                counts = score(np.asarray(margin), episode.query_mask, mask, protocol)
                row = (sampler.seed, ids.index, ids.query, ids.class_id, *counts)
                rows.append(row)
                bar.update()
    return Scores(np.array(rows, np.int64))


def score(
    margin: Float[np.ndarray, "s s"],
    fitted_mask: UInt8[np.ndarray, "s s"],
    mask: UInt8[np.ndarray, "h w"],
    protocol: Protocol,
) -> tuple[int, int, int, int]:
    """Return the pixel counts of one episode at the protocol's size."""
    if protocol.scoring == "input":
        return metrics.count_pixels(margin > 0, fitted_mask)
    height, width = mask.shape
    if protocol.scoring == "exact":
        return metrics.count_pixels(unpad(margin, height, width) > 0, mask)
    stretch = interpolation_matrix(margin.shape[0], max(height, width))
    return metrics.count_pixels(stretch[:height] @ margin @ stretch[:width].T > 0, mask)


def unpad(
    margin: Float[np.ndarray, "s s"], height: int, width: int
) -> Float[np.ndarray, "h w"]:
    """Cut the image's content out of the padded square and resize it to the image."""
    rows, cols = content_size(height, width, margin.shape[0])
    content = np.ascontiguousarray(margin[:rows, :cols])
    return cv2.resize(content, (width, height), interpolation=cv2.INTER_LINEAR)


def summarize(
    scores: Scores,
    protocol: Protocol,
    class_ids: Sequence[int],
    seconds: float,
    focus: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the contents of results.json; IoU in percent.

    `focus` names classes whose own mean is given beside the mean over all.
    """
    iou = metrics.class_iou(scores, class_ids)
    low, high = metrics.interval(scores, class_ids)
    by_seed = metrics.seed_iou(scores, class_ids)
    result = {
        "miou": _percent(iou.mean()),
        "miou_interval": [_percent(low), _percent(high)],
        "fb_iou": _percent(metrics.fb_iou(scores)),
        "per_class": dict(zip(protocol.classes, map(_percent, iou), strict=True)),
        "per_seed": {str(s): _percent(v.mean()) for s, v in by_seed.items()},
        "episodes": protocol.episodes,
        "seeds": list(protocol.seeds),
        "protocol": protocol.to_dict(),
        "seconds": round(seconds, 1),
    }
    if focus:
        chosen = [class_ids[protocol.classes.index(name)] for name in focus]
        result["focus"] = {
            "classes": list(focus),
            "miou": _percent(metrics.mean_iou(scores, chosen)),
            "miou_interval": [_percent(v) for v in metrics.interval(scores, chosen)],
        }
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: a column a result, a row a class, means last."""
    names = list(results)
    first = results[names[0]]
    rows = [
        (name, *(f"{r['per_class'][name]:.1f}" for r in results.values()))
        for name in first["per_class"]
    ]
    if "focus" in first:
        title = "mean of " + ", ".join(first["focus"]["classes"])
        rows.append((title, *(_with_interval(r["focus"]) for r in results.values())))
    rows.append(("mIoU", *(_with_interval(r) for r in results.values())))
    rows.append(("FB-IoU", *(f"{r['fb_iou']:.1f}" for r in results.values())))
    header = ("IoU %", *names)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def _percent(value: float) -> float:
    return round(100 * float(value), 2)


def _with_interval(result: dict[str, Any]) -> str:
    low, high = result["miou_interval"]
    return f"{result['miou']:.1f} [{low:.1f}, {high:.1f}]"
