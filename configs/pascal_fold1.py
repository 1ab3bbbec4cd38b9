"""PASCAL-5i fold 1: python train.py --config configs/pascal_fold1.py; see common.py."""

from configs import common


def get_config():
    return common.pascal_fold(1)
