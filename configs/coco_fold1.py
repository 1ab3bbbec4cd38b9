"""COCO-20i fold 1: python train.py --config configs/coco_fold1.py; see common.py."""

from configs import common


def get_config():
    return common.coco_fold(1)
