"""PASCAL-5i fold 3: python train.py --config configs/pascal_fold3.py; see common.py."""

from configs import common


def get_config():
    return common.pascal_fold(3)
