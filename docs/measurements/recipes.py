"""Measure what makes training stable: the tables of docs/training.md.

    python docs/measurements/recipes.py --data ../shared/data/voc --rows before,stable

trains each row on fold 2 of the VOC subset with EfficientNet-Lite0, whose features are
multiplied by each scale as if they were another backbone's, with the schedule of a run
of 200,000 steps, and prints the table.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qpenet_jax.backbones.convert import wheel_file
from qpenet_jax.backbones.registry import BACKBONES
from qpenet_jax.backbones.torch_layout import ORIGINALS
from qpenet_jax.core import markdown
from qpenet_jax.core.runtime import keep_compilations, keep_freed_memory
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.training import health
from qpenet_jax.training.preflight import JUDGED, first_steps

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "pascal_fold2.py"

LITE0 = "efficientnet_lite0"
NET = BACKBONES[LITE0]

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


class Scaled(nn.Module):
    """A backbone's module whose features are multiplied by a number."""

    module: nn.Module
    scale: float

    def setup(self):
        """Gives the parameters the names that the module alone gives them."""
        nn.share_scope(self, self.module)

    def __call__(self, images):
        """Returns the scaled stages."""
        return {name: self.scale * x for name, x in self.module(images).items()}


ORIGINALS[Scaled] = ORIGINALS[type(NET.module)]  # the same files


def train(row, scale, seed, args):
    """Trains once and returns the measurements."""
    zoom = 1.0 if args.native else args.side / 473
    settings = {
        "seed": seed,
        "side": args.side,
        "steps": 200_000,
        "workers": 0,
        "dataset.kind": "voc",
        "dataset.root": args.data / "VOCdevkit" / "VOC2012",
        "dataset.train_ids": args.data / "lists" / "subset_train.txt",
        "dataset.val_ids": args.data / "lists" / "subset_val.txt",
        "dataset.on_few": "drop",
        "augmentation.scale": f"({0.9 * zoom}, {1.1 * zoom})",
        "backbone.name": LITE0,
        "backbone.weights": wheel_file(),
    } | ROWS[row]
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    BACKBONES[LITE0] = NET._replace(module=Scaled(NET.module, scale))
    seen, finite = [], True
    with contextlib.closing(
        first_steps(complete(load_config(CONFIG, words)))
    ) as stream:
        while finite and len(seen) < args.steps:
            seen.append(next(stream).metrics)
            finite = health.is_finite(seen[-1])
    last = seen[-JUDGED:]
    mean = {name: float(np.mean([m[name] for m in last])) for name in last[0]}
    dead = health.dead_heads(last) if finite else {}
    gradient = float(np.nanmax([m["grad_norm"] for m in seen]))
    run = {"row": row, "scale": scale, "seed": seed, "steps": len(seen)}
    return run | {"finite": finite, "gradient": gradient, "dead": dead} | mean


HEADER = ("row", "features x", "NaN at", "largest gradient", "IoU", "y_pre", "y_rev")
HEADER += ("y_aux", "y_final", "y_bg_q", "dead heads")
SHOWN = ("iou", "loss_pre", "loss_rev", "loss_aux", "loss_final", "loss_bg_q")


def line(row, scale, runs):
    """Returns a line of the table: the seeds of a row side by side."""
    nan = ["no" if run["finite"] else f"{run['steps']}" for run in runs]
    gradient = [f"{run['gradient']:.0f}" for run in runs]
    means = [[f"{r[x]:.2f}" if r["finite"] else "-" for r in runs] for x in SHOWN]
    dead = "; ".join(" ".join(run["dead"]) or "none" for run in runs)
    return row, f"{scale:g}", *map(", ".join, (nan, gradient, *means)), dead


def main():
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the VOC subset")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--scales", default="1,0.04")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--side", type=int, default=97)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--native", action="store_true", help="crop at the images' own size"
    )
    args = parser.parse_args()
    keep_freed_memory()
    keep_compilations()
    lines = []
    for row in args.rows.split(","):
        for scale in map(float, args.scales.split(",")):
            seeds = map(int, args.seeds.split(","))
            runs = [train(row, scale, seed, args) for seed in seeds]
            lines.append(line(row, scale, runs))
            print(lines[-1], flush=True)
    print(markdown.table(HEADER, lines, numbers=True))


if __name__ == "__main__":
    main()
