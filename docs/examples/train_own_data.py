"""Train on your own images and masks; the named classes are held out for the score.

python docs/examples/train_own_data.py FOLDER WORKDIR CLASS [CLASS ...]
"""

import sys
from pathlib import Path

from qpenet_jax.config import default_config
from qpenet_jax.data.prepare.image_folder import prepare_folder
from qpenet_jax.training.train import train


def train_on(folder, workdir, novel, **fields):
    """Prepares FOLDER (its layout: data/README.md), train and score a network."""
    config = default_config()
    config.dataset.root = str(prepare_folder(Path(folder), Path(workdir) / "data"))
    config.dataset.name = Path(folder).name
    config.dataset.split, config.dataset.novel = "named", tuple(novel)
    config.backbone.name, config.backbone.weights = "efficientnet_lite0", ""
    config.side, config.epochs, config.select_on = 321, 100, "last"
    config.update_from_flattened_dict(fields)
    train(config, Path(workdir) / "run")


if __name__ == "__main__":  # needed: the processes that load images import this file
    train_on(sys.argv[1], sys.argv[2], sys.argv[3:])
