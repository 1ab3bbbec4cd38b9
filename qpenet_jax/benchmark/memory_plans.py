"""The memory that steps will need, by XLA's plan of their buffers: nothing is run.

A step for another platform is lowered for it, which takes that platform's formulations
(`models/ops/`), and compiled by the compiler that is here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export
from tqdm import tqdm

from qpenet_jax.benchmark import jax_side
from qpenet_jax.benchmark.made_up import made_up_episodes
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.benchmark.speed_report import Row, Table
from qpenet_jax.core.types import IGNORE
from qpenet_jax.evaluation.scoring import CACHE_BYTES
from qpenet_jax.models.qpenet import QPENet

PLATFORMS = {"cpu": "CPU", "cuda": "NVIDIA GPU", "rocm": "AMD GPU", "tpu": "TPU"}

CAPTION = (
    "Memory of one step in GiB, as XLA plans it, with dropout; nothing was run. "
    "Temporaries, and with them the weights, the optimiser's state and the batch. An "
    f"evaluation keeps encoded images as well, up to {CACHE_BYTES / 2**30:g} GiB."
)

ESTIMATE = (
    " The plan for GPUs is an estimate: it is XLA's CPU compiler's, of the "
    "formulations that GPUs and TPUs take. A GPU's compiler merges more of them; CUDA "
    "itself, and the workspace of cuDNN's convolutions, come on top."
)


def memory_plans(settings: Settings) -> Table:
    """Returns the plans of every evaluation and train step of the settings.

    On a CPU the plans are for it and for GPUs, else for the device that is here.
    """
    here = export.default_export_platform()
    platforms = (here, "cuda") if here == "cpu" else (here,)
    rows = []
    for case in tqdm([*settings.cases(("eval", "train"))], "planning", unit="step"):
        row: Row = {"step": str(case)}
        for platform in platforms:
            found, name = plan(case, platform), PLATFORMS.get(platform, platform)
            row[f"{name}: temporaries"] = found["temporaries"] / 2**30
            row[f"{name}: in all"] = sum(found.values()) / 2**30
        rows.append(row)
    return Table(CAPTION + (ESTIMATE if len(platforms) > 1 else ""), rows)


def plan(case: Case, platform: str) -> dict[str, int]:
    """Returns `planned` of a case, with dropout, as networks are trained."""
    dropout = {name: getattr(QPENet, name) for name in jax_side.NO_DROPOUT}
    case = dataclasses.replace(case, network={**dropout, **case.network})

    episodes = made_up_episodes(case)
    episodes = episodes._replace(
        query_padding=episodes.query_mask == IGNORE,
        support_padding=episodes.support_masks == IGNORE,
    )
    inputs = jax.eval_shape(
        lambda: jax_side.inputs_of(case, jax_side.random_weights(case), episodes)
    )
    return planned(jax_side.step_of(case), inputs, platform)


def planned(
    step: Callable[..., Any], inputs: Sequence[Any], platform: str
) -> dict[str, int]:
    """Returns the bytes of a step's temporaries, and of its inputs.

    `inputs` are arrays or their shapes; `platform` is one of JAX's, such as "cuda".
    The results of a step aren't counted: a train step's take the place of its inputs.
    """
    check = export.DisabledSafetyCheck
    # Compiled where it isn't to run; and cuDNN's attention, if it is taken.
    attention = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    unchecked = [check.platform(), *map(check.custom_call, attention)]
    exported = export.export(
        jax.jit(step), platforms=(platform,), disabled_checks=unchecked
    )
    compiled = jax.jit(exported(*inputs).call).lower(*inputs).compile()
    memory: Any = compiled.memory_analysis()
    return {
        "temporaries": memory.temp_size_in_bytes,
        "inputs": memory.argument_size_in_bytes,
    }
