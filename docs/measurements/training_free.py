"""Score self-support, which needs no training, beside the cosine baseline.

    python docs/measurements/training_free.py --config configs/starter.py \
        --config.dataset.root=FOLDER/starter/1.0.0 --config.side=473 --sheet sheet.png

scores both on the same episodes of the config's evaluation protocol, prints a table
with 95 % intervals and the paired difference, and draws the first twelve episodes, not
chosen: the tables of docs/starter.md. Any config will do, and no run is needed; one
that was trained is scored beside them with `--workdir RUN`, alone and in the mean with
self-support; `--workdir qpenet_jax/starter` is the starter.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qpenet_jax.evaluation.metrics import estimate_difference
from qpenet_jax.evaluation.pictures import episode_figure, save_image
from qpenet_jax.evaluation.report import summarize, table
from qpenet_jax.evaluation.scoring import score_episodes
from qpenet_jax.runs.build import (
    build_cosine_predictor,
    build_mean_predictor,
    build_predictor,
    build_self_support_predictor,
    build_weights,
    complete,
)
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_protocol
from qpenet_jax.runs.evaluator import scored_episodes
from qpenet_jax.runs.folder import open_run

SHOWN = 12

COMPARED = (
    ("self-support", "cosine"),
    ("QPENet", "self-support"),
    ("mean", "self-support"),
    ("mean", "cosine"),
)
"""Pairs whose differences are printed, of those that are scored."""


def main(config, sheet, workdir, overrides):
    config = complete(load_config(config, overrides))
    weights, val = build_weights(config), build_dataset(config, "val")
    predictors = {
        "cosine": build_cosine_predictor(config, weights),
        "self-support": build_self_support_predictor(config, weights),
    }
    if workdir:
        run = open_run(workdir)
        learned = run.params, run.weights
        predictors["QPENet"] = build_predictor(run.config, *learned)
        predictors["mean"] = build_mean_predictor(run.config, *learned)
    found = scored_episodes(config, val, build_protocol(config))
    protocol, samplers, class_ids, _ = found
    print(protocol)
    scores = {
        name: score_episodes(predict, val, protocol, samplers, label=name)
        for name, predict in predictors.items()
    }
    found = {
        name: summarize(each, protocol, class_ids) for name, each in scores.items()
    }
    print(table(found))
    for one, other in COMPARED:
        if one not in scores:
            continue
        difference = estimate_difference(scores[one], scores[other], class_ids).miou
        value, low, high = (100 * v for v in difference)
        print(f"{one} - {other}, mIoU: {value:+.1f} [{low:+.1f}, {high:+.1f}]")
    if sheet:
        shown = [samplers[0](i) for i in range(SHOWN)]
        figure = episode_figure(val, shown, predictors, protocol.side, protocol.resize)
        save_image(figure, sheet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--workdir", type=Path)
    known, others = parser.parse_known_args()
    main(known.config, known.sheet, known.workdir, others)
