"""Checkpoints of a run by Orbax: the latest and the best."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree
from orbax.checkpoint import checkpoint_managers as policies

from qpenet_jax.errors import InputError
from qpenet_jax.training import TrainState


def open_checkpoints(workdir: Path) -> ocp.CheckpointManager:
    """Return the manager of a run, to be used in a `with` (closing finishes saves).

    Saves with a `miou` metric compete for best; the latest is kept whatever it scored.
    """

    def miou(metrics):
        return metrics["miou"]

    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(1),
            policies.BestN(
                get_metric_fn=miou, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(best_fn=miou, preservation_policy=keep)
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def save(
    manager: ocp.CheckpointManager, state: TrainState, miou: float | None = None
) -> None:
    """Save the state under its step, unless that step is saved already."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    metrics = None if miou is None else {"miou": miou}
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(
            {"step": state.step, "opt_state": state.opt_state}
        ),
    )
    manager.save(step, args=args, metrics=metrics)


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Return the latest saved state, or `state` if there is none."""
    step = manager.latest_step()
    if step is None:
        return state
    rest = {"step": state.step, "opt_state": state.opt_state}
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(_abstract(state.params)),
        optimizer=ocp.args.StandardRestore(_abstract(rest)),
    )
    saved = manager.restore(step, args=args)
    return TrainState(params=saved["params"], **saved["optimizer"])


def restore_params(workdir: Path) -> PyTree[Array]:
    """Return the parameters of the best checkpoint, or of the latest if none is scored.

    Raises InputError if the run has none.
    """
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} has no checkpoint: let train.py save one first")
    with open_checkpoints(workdir) as manager:
        step = manager.best_step()
        step = manager.latest_step() if step is None else step
        if step is None:
            raise InputError(
                f"{workdir} has no checkpoint: let train.py save one first"
            )
        args = ocp.args.Composite(params=ocp.args.StandardRestore())
        return manager.restore(step, args=args)["params"]


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
