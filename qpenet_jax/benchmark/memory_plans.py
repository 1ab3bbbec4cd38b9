"""What steps will need in memory, by XLA's plan of their buffers: nothing is run.

A step for another platform is lowered for it, which takes that platform's formulations
(`models/ops/`), and compiled by the compiler that is here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from tqdm import tqdm

from qpenet_jax.benchmark import jax_side as ours
from qpenet_jax.benchmark.settings import Case, Settings
from qpenet_jax.core.types import Episode
from qpenet_jax.models.qpenet import QPENet


def memory_plans(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields what every evaluation and train step of the settings needs, by platform.

    On a CPU the plans are for it and for GPUs, else for the device that is here.
    """
    here = export.default_export_platform()
    platforms = (here, "cuda") if here == "cpu" else (here,)
    cases = list(settings.cases(("eval", "train")))
    for case in tqdm(cases, desc="planning", unit="step"):
        plans = {platform: plan(case, platform) for platform in platforms}
        yield dataclasses.asdict(case) | {"name": str(case), "plans": plans}


def plan(case: Case, platform: str) -> dict[str, int]:
    """Returns `planned` of a case, with dropout, as networks are trained."""
    dropout = {name: getattr(QPENet, name) for name in ours.NO_DROPOUT}
    case = dataclasses.replace(case, network={**dropout, **case.network})
    inputs = jax.eval_shape(
        lambda episodes: ours.inputs_of(case, ours.random_weights(case), episodes),
        _episodes(case),
    )
    return planned(ours.step_of(case), inputs, platform)


def planned(
    step: Callable[..., Any], inputs: Sequence[Any], platform: str
) -> dict[str, int]:
    """Returns the bytes of a step's temporaries, and of its inputs.

    `inputs` are arrays or their shapes; `platform` is one of JAX's, such as "cuda".
    What a step returns isn't counted: a train step's takes the place of its inputs.
    """
    exported = export.export(
        jax.jit(step),
        platforms=(platform,),
        # Compiled where it isn't to run; and cuDNN's attention, if it is taken.
        disabled_checks=[
            export.DisabledSafetyCheck.platform(),
            *(
                export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{name}")
                for name in ("", "Backward")
            ),
        ],
    )
    compiled = jax.jit(exported(*inputs).call).lower(*inputs).compile()
    memory: Any = compiled.memory_analysis()
    return {
        "temporaries": memory.temp_size_in_bytes,
        "inputs": memory.argument_size_in_bytes,
    }


def _episodes(case: Case) -> Episode:
    """Returns the shapes of a case's batch."""
    square = case.size, case.size

    def shape(*margin: int, dtype: Any = np.uint8) -> Any:
        return jax.ShapeDtypeStruct(margin, dtype)

    query, supports = (case.batch, *square), (case.batch, case.shots, *square)
    return Episode(
        shape(*query, 3),
        shape(*query),
        shape(*supports, 3),
        shape(*supports),
        shape(*query, dtype=bool),
        shape(*supports, dtype=bool),
    )
