"""Gather what the starter model was trained and judged on into one folder.

python data/starter.py VOC CCP COCO OUT
qpenet prepare folder OUT --name starter --out data/

VOC holds `JPEGImages` and `SegmentationClassAug`, CCP is a folder for `qpenet prepare
folder`, COCO holds `train2017` and `annotations/instances_train2017.json`. Trained on:
all of VOC and CCP. Judged on: COCO's images; its classes that neither of the two knows,
under any name, are novel.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from qpenet_jax.data.folds import COCO_CLASSES, PASCAL_CLASSES
from qpenet_jax.data.images import read_label
from qpenet_jax.data.prepare.instances import Instances

KNOWN_AS = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
    "backpack": "bag",
    "handbag": "bag",
}
"""COCO's names of classes that VOC or CCP call otherwise."""


def gather(voc: Path, ccp: Path, coco: Path, out: Path) -> None:
    """Writes the images, masks of one numbering, class names and lists below `out`."""
    clothes = (ccp / "classes.txt").read_text().split()
    classes = [*PASCAL_CLASSES, *clothes]
    named = [KNOWN_AS.get(name, name) for name in COCO_CLASSES]
    classes += [name for name in named if name not in classes]
    instances = Instances(coco / "annotations" / "instances_train2017.json")

    of_voc, of_ccp, of_coco = (
        _table(names, classes) for names in (PASCAL_CLASSES, clothes, named)
    )
    voc_masks, ccp_masks = _masks(voc / "SegmentationClassAug"), _masks(ccp / "masks")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True)
    train, val = [], []
    for mask in voc_masks:
        image = voc / "JPEGImages" / f"{mask.stem}.jpg"
        train.append(_put(out, "voc", image, of_voc[read_label(mask)]))
    for mask in ccp_masks:
        image = ccp / "images" / f"{mask.stem}.jpg"
        train.append(_put(out, "ccp", image, of_ccp[read_label(mask)]))
    for name, file in sorted(instances.files.items()):
        image = coco / "train2017" / file
        val.append(_put(out, "coco", image, of_coco[instances.label(name)]))
    for split, names in {"train": train, "val": val, "classes": classes}.items():
        (out / f"{split}.txt").write_text("\n".join(names) + "\n")


def _masks(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.png"))
    if not found:
        raise SystemExit(f"{folder} holds no mask (*.png): see {__file__}")
    return found


def _table(names, classes) -> np.ndarray:
    """Returns our number of every number of a data set; 0 and 255 stay."""
    table = np.arange(256, dtype=np.uint8)
    table[1 : len(names) + 1] = [classes.index(name) + 1 for name in names]
    return table


def _put(out: Path, source: str, image: Path, label: np.ndarray) -> str:
    name = f"{source}_{image.stem}"
    shutil.copy(image, out / "images" / f"{name}.jpg")
    Image.fromarray(label).save(out / "masks" / f"{name}.png")
    return name


if __name__ == "__main__":
    gather(*map(Path, sys.argv[1:]))
