"""COCO-20i fold 0: python train.py --config configs/coco_fold0.py; see common.py."""

from configs import common


def get_config():
    return common.coco_fold(0)
