"""COCO-20i fold 3: python train.py --config configs/coco_fold3.py; see common.py."""

from configs import common


def get_config():
    return common.coco_fold(3)
