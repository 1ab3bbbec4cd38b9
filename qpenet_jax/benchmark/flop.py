"""Count the floating-point operations (FLOP) of a JAX function, without running it.

XLA's own `cost_analysis()` counts the body of a loop once, and the formulation that the
platform takes.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core


def flop(jaxpr: Any, used: Sequence[bool] | None = None) -> int:
    """Returns the FLOP of the convolutions and matrix products that a jaxpr needs.

    A multiplication and an addition are two. Padding counts, zeros put between pixels
    don't. Of `platform_dependent` the default counts: faster formulations (Winograd)
    then show as speed, not as less work. `used` marks the outputs that are needed; by
    default all.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    outputs = zip(jaxpr.outvars, used or [True] * len(jaxpr.outvars), strict=True)
    needed = {var for var, is_used in outputs if is_used and _is_var(var)}
    total = 0
    for equation in reversed(jaxpr.eqns):
        wanted = [var in needed for var in equation.outvars]
        if any(wanted):
            total += _equation_flop(equation, wanted)
            needed.update(filter(_is_var, equation.invars))
    return total


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _equation_flop(equation: Any, wanted: Sequence[bool]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * inner
    if name == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        products = outputs.size * (kernel.size // features)
        return 2 * products // math.prod(params["lhs_dilation"])
    if name == "cond":
        branches = params["branches"]
        if params.get("branches_platforms"):
            branches = [branches[params["branches_platforms"].index(None)]]
        return max(flop(branch, wanted) for branch in branches)
    if name == "scan":
        return params["length"] * flop(params["jaxpr"])
    # Of a `while` the number of rounds isn't known: one.
    names = ("jaxpr", "call_jaxpr", "body_jaxpr")
    inner = next((params[key] for key in names if key in params), None)
    if inner is None:
        return 0
    return flop(inner) if name == "while" else flop(inner, wanted)
