"""PASCAL-5i fold 0: python train.py --config configs/pascal_fold0.py; see common.py."""

from configs import common


def get_config():
    return common.pascal_fold(0)
