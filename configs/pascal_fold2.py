"""PASCAL-5i fold 2: python train.py --config configs/pascal_fold2.py; see common.py."""

from configs import common


def get_config():
    return common.pascal_fold(2)
