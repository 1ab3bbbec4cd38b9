"""The embedded default: novel shapes after minutes of training on 2 CPU cores.

python train.py --config configs/quickstart.py
"""

from configs import common


def get_config():
    config = common.get_config()
    config.dataset.kind = "shapes"
    config.dataset.name = "Shapes"
    config.dataset.fold = 0
    config.dataset.min_pixels = 256
    config.backbone.name = "efficientnet_lite0"
    config.backbone.weights = ""
    config.optimizer.name = "adamw"
    config.optimizer.lr = 3e-4
    config.optimizer.lr_factor = 1.0
    config.model.channel_dropout = 0.2  # 0.5 is too noisy for so few steps
    config.side = 161
    config.steps = 240
    config.workers = 1
    config.log_every = 10
    config.save_every = 60
    config.eval.every = 240
    config.eval.episodes = 200
    config.eval.references = True
    return config
