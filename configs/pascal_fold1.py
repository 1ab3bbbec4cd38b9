"""PASCAL-5i fold 1, ResNet-50, 1 shot (Table I; the paper reports 71.9 mIoU).

python train.py --config configs/pascal_fold1.py --check   # 200 steps, a verdict
python train.py --config configs/pascal_fold1.py

Novel: bus, car, cat, chair, cow.
200 epochs of 3,726 images = 186,200 steps of batch 4 at 473 pixels, about
2 TFLOP each: for a GPU. Not yet run by us on the full data set.
The recipe is ours, not the paper's: `qpenet_jax/config.py` says whose values are whose.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.fold = 1
    return config
