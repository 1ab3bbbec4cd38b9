"""COCO-20i fold 2: python train.py --config configs/coco_fold2.py; see common.py."""

from configs import common


def get_config():
    return common.coco_fold(2)
