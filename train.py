"""Train QPENet; the same as `qpenet train`.

    python train.py --config configs/quickstart.py
    python train.py --config configs/pascal_fold0.py --check
    python train.py --config configs/pascal_fold0.py --config.optimizer.lr=0.001 \
        --workdir runs/my_run

`--check` trains for 200 steps, writes nothing and says whether a long run may start:
finite, all heads alive, loading keeps up, memory, hours to go. `--profile 20` traces 20
steps for TensorBoard or xprof. Run the same command again to resume. The workdir holds
config.json, checkpoints, TensorBoard events, results.json, the scored episodes and a
figure of some of them. The loop itself is in qpenet_jax/training/train.py.
"""

import sys

from qpenet_jax.cli.main import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
