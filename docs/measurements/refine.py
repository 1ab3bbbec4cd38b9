"""Measure what `qpenet predict --refine` gains: the table of docs/measured.md.

    python docs/measurements/refine.py --data DATA --episodes 200 --side 321
    python docs/measurements/refine.py --data DATA --workdir RUN
    python docs/measurements/refine.py --data DATA --truth --side 473

samples episodes of one support from the list `subset_val.txt`, seed 0, among classes
with ten images of 2,048 pixels or more, and prints the means of IoU and of the boundary
F-measure, plain and refined, and their paired differences with 95 % intervals. Without
`--workdir` it is the training-free method. `--truth` takes in place of a prediction the
truth at the network's grid, which is the best that a network could say there.

Boundary F-measure: of the pixels of the mask's contour, the share within 0.8 % of the
image's diagonal from the truth's contour, and the other way round; their harmonic mean.
Source: Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation, CVPR 2016 (DAVIS), with the dilation of its authors' code.
"""

import argparse
import math
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import qpenet_jax
from qpenet_jax.data.folds import PASCAL_CLASSES
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.transforms import binary_mask, fit_label, unpad
from qpenet_jax.masks.refine import Edges
from qpenet_jax.masks.tasks import probability

MIN_PIXELS, MIN_IMAGES, TOLERANCE = 2048, 10, 0.008


def contour(mask):
    """Returns the pixels that differ from one to the right, below, or both."""
    mask = mask.astype(np.uint8)
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    shifted = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.any([mask != other for other in shifted], axis=0)


def boundary_f(found, truth):
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = (x * x + y * y <= radius * radius).astype(np.uint8)
    ours, theirs = contour(found), contour(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    near = [cv2.dilate(c.astype(np.uint8), disc) == 1 for c in (theirs, ours)]
    precision, recall = near[0][ours].mean(), near[1][theirs].mean()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def iou(found, truth, counted):
    both, either = (found & truth)[counted].sum(), (found | truth)[counted].sum()
    return both / max(either, 1)


def at_the_grid(mask, side):
    """Returns the truth as seen at the grid's points, interpolated in between."""
    cells = (fit_label(mask, side)[::8, ::8] == 1).astype(np.float32)
    places = np.arange(side, dtype=np.float32) / 8
    across, down = np.meshgrid(places, places)
    return unpad(cv2.remap(cells, across, down, cv2.INTER_LINEAR), *mask.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir")
    parser.add_argument("--side", type=int, default=473)
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--episodes", type=int, default=200)
    args = parser.parse_args()
    side = args.side
    if not args.truth:
        over = [] if args.workdir else [f"--config.side={side}"]
        method = "qpenet" if args.workdir else "prototype"
        segmenter = qpenet_jax.load(args.workdir, over, method=method)
        side = segmenter.side
    root, ids = args.data / "VOCdevkit" / "VOC2012", args.data / "lists"
    voc = VOCLayout(root, ids / "subset_val.txt", PASCAL_CLASSES)
    shown = {
        c: np.flatnonzero(voc.counts[:, c - 1] >= MIN_PIXELS) for c in range(1, 21)
    }
    classes = [c for c in shown if len(shown[c]) >= MIN_IMAGES]
    rng, rows = np.random.default_rng(0), []
    for _ in range(args.episodes):
        c = int(rng.choice(classes))
        support, query = rng.choice(shown[c], 2, replace=False)
        photo, marked = voc.image(query), binary_mask(voc.label(query), c)
        truth, counted = marked == 1, marked != 255
        if args.truth:
            plain = at_the_grid(marked, side)
        else:
            mask = binary_mask(voc.label(support), c)
            task = segmenter.learn(voc.image(support), mask)
            plain = probability(task.margin(task.view(photo)))
        refined = Edges(photo, 8 * max(truth.shape) / side)(plain)
        masks = plain > 0.5, refined > 0.5
        ious = [iou(mask, truth, counted) for mask in masks]
        rows.append([*ious, *(boundary_f(mask, truth) for mask in masks)])
    table = 100 * np.array(rows)
    for i, what in enumerate(("IoU", "boundary F")):
        plain, refined = table[:, 2 * i : 2 * i + 2].T
        gain = refined - plain
        spread = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain))
        print(
            f"side {side}, {len(gain)} episodes, {what}: plain {plain.mean():.1f}, "
            f"refined {refined.mean():.1f}, gain {gain.mean():+.1f} +- {spread:.1f}"
        )


if __name__ == "__main__":
    main()
