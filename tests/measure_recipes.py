"""Measure what makes training stable: the tables of docs/training.md.

    python tests/measure_recipes.py --data ../shared/data/voc --out rows.jsonl \\
        --rows before,stable --scales 1,0.2,0.04 --seeds 0,1,2

trains each row on fold 2 of the VOC subset with EfficientNet-Lite0, whose features are
multiplied by each scale as if they were another backbone's, with the schedule of a run
of 200,000 steps. It appends a line of JSON for each run and prints the file's table.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpenet_jax.backbones.registry import BACKBONES
from qpenet_jax.core.runtime import keep_compilations, keep_freed_memory
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.training import health
from qpenet_jax.training.preflight import JUDGED, first_steps, is_finite

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pascal_fold2.py"

LITE0 = "efficientnet_lite0"

WEIGHTS = {"loss.beta": 0.5, "loss.pre": 0.25, "loss.rev": 0.25}
BEFORE = {"recipe": "paper", "optimizer.lr_factor": 10.0}

ROWS = {
    "before": BEFORE,
    "zero": BEFORE | {"model.background_scale": 0.0},
    "weights": BEFORE | WEIGHTS,
    "clip": BEFORE | {"optimizer.clip": 2.0},
    "warm_up": BEFORE | {"optimizer.warm_up": 100},
    "stable": {"recipe": "stable"},
    "released": {"recipe": "released"},
    "released_normalize": {"recipe": "released", "model.normalize": True},
    "paper": {"recipe": "paper"},
}
"""What each row changes; "before" is what was shipped until this table was made,
"stable" is that on normalised features."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A backbone's module whose features are multiplied by a number."""

    module: nn.Module
    scale: float

    def init(self, *given):
        """Returns the module's own weights."""
        return self.module.init(*given)

    def apply(self, variables, images):
        """Returns the scaled stages."""
        stages = self.module.apply(variables, images)
        return {name: self.scale * value for name, value in stages.items()}


def train(row, scale, seed, data, side, steps, native):
    """Train once and return the measurements."""
    zoom = 1.0 if native else side / 473
    settings = {
        "seed": seed,
        "side": side,
        "steps": 200_000,
        "workers": 0,
        "dataset.kind": "voc",
        "dataset.root": data / "VOCdevkit" / "VOC2012",
        "dataset.train_ids": data / "lists" / "subset_train.txt",
        "dataset.val_ids": data / "lists" / "subset_val.txt",
        "dataset.on_few": "drop",
        "augmentation.scale": f"({0.9 * zoom}, {1.1 * zoom})",
        "backbone.name": LITE0,
        "backbone.weights": "",
    } | ROWS[row]
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    config = load_config(CONFIG, words)
    net = BACKBONES[LITE0]
    BACKBONES[LITE0] = net._replace(module=Scaled(net.module, scale))
    seen = []
    stream = first_steps(config)
    finite = True
    with contextlib.closing(stream):
        while finite and len(seen) < steps:
            seen.append(next(stream).metrics)
            finite = is_finite(seen[-1])
    BACKBONES[LITE0] = net
    last = seen[-JUDGED:]
    mean = {name: float(np.mean([m[name] for m in last])) for name in last[0]}
    dead = health.dead_heads(last) if finite else {}
    gradient = float(np.nanmax([m["grad_norm"] for m in seen]))
    run = {"row": row, "scale": scale, "seed": seed, "side": side, "steps": len(seen)}
    return run | {"finite": finite, "gradient": gradient, "dead": dead} | mean


def table(runs):
    """Returns the runs in Markdown, seeds side by side."""
    lines = [
        "| row | features x | NaN at | largest gradient | IoU | y_pre | y_rev | y_aux "
        "| y_final | y_bg_q | dead heads |",
        "|---|" + "--:|" * 9 + "---|",
    ]
    groups = {}
    for run in runs:
        groups.setdefault((run["row"], run["scale"]), []).append(run)
    for (row, scale), group in groups.items():

        def cells(name, digits, group=group):
            return ", ".join(
                f"{run[name]:.{digits}f}" if run["finite"] else "-" for run in group
            )

        nan = ", ".join("no" if r["finite"] else str(r["steps"]) for r in group)
        gradient = ", ".join(f"{run['gradient']:.0f}" for run in group)
        names = ("loss_pre", "loss_rev", "loss_aux", "loss_final", "loss_bg_q")
        dead = "; ".join(" ".join(run["dead"]) or "none" for run in group)
        shown = [cells("iou", 2), *(cells(name, 2) for name in names)]
        lines.append(
            f"| {' | '.join([row, f'{scale:g}', nan, gradient, *shown, dead])} |"
        )
    return "\n".join(lines)


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the VOC subset")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--scales", default="1,0.2,0.04")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--side", type=int, default=161)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--native",
        action="store_true",
        help="crop the images at their own size, which cuts most objects",
    )
    args = parser.parse_args()
    keep_freed_memory()
    keep_compilations()
    for row in filter(None, args.rows.split(",")):
        for scale in map(float, args.scales.split(",")):
            for seed in map(int, args.seeds.split(",")):
                run = train(
                    row, scale, seed, args.data, args.side, args.steps, args.native
                )
                with args.out.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print(json.dumps(run), flush=True)
    print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
