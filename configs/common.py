"""The defaults of every config file in this folder, which changes a few lines each.

All fields, their values and whose they are: `qpenet_jax/config.py`. The fold configs
train with ResNet-50, 1 shot and batches of 4 at 473 pixels, about 2 TFLOP a step: for a
GPU. They have not yet been run by us on the full data sets. Their recipe is ours, not
the paper's.

PASCAL-5i, 200 epochs; mIoU is that of the paper's Table I:

| fold | novel classes | images | steps | mIoU |
|---|---|--:|--:|--:|
| 0 | aeroplane, bicycle, bird, boat, bottle | 4,208 | 210,400 | 65.2 |
| 1 | bus, car, cat, chair, cow | 3,726 | 186,200 | 71.9 |
| 2 | diningtable, dog, horse, motorbike, person | 2,752 | 137,600 | 64.1 |
| 3 | pottedplant, sheep, sofa, train, tvmonitor | 4,510 | 225,400 | 59.5 |

COCO-20i, 50 epochs, the split of FWB; mIoU is that of Table II:

| fold | ids of the novel classes, of 1 to 80 | mIoU |
|---|---|--:|
| 0 | 1, 5, ..., 77 | 41.5 |
| 1 | 2, 6, ..., 78 | 47.3 |
| 2 | 3, 7, ..., 79 | 40.9 |
| 3 | 4, 8, ..., 80 | 39.4 |
"""

from qpenet_jax.config import default_config as get_config
from qpenet_jax.recipes import for_coco, for_released

__all__ = ["coco_fold", "for_coco", "for_released", "get_config", "pascal_fold"]


def pascal_fold(fold):
    config = get_config()
    config.dataset.fold = fold
    return config


def coco_fold(fold):
    config = for_coco(get_config())
    config.dataset.fold = fold
    return config
