"""Count the floating-point operations (FLOP) of a JAX function, without running it."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core


def flop(jaxpr: Any, used: Sequence[bool] | None = None) -> int:
    """Counts the FLOP of the convolutions and matrix products that a jaxpr needs.

    A multiplication and an addition are two. Padding counts, zeros put between pixels
    don't. Of `platform_dependent` the default counts, which is the plain formulation:
    faster ones (Winograd) then show as speed, not as less work. `used` tells which
    outputs are needed; by default all.
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
        return _product_flop(equation)
    if name == "conv_general_dilated":
        return _convolution_flop(equation)
    if name == "cond":
        branches = params["branches"]
        platforms = params.get("branches_platforms")
        if platforms:
            return flop(branches[platforms.index(None)], wanted)
        return max(flop(branch, wanted) for branch in branches)
    if name == "scan":
        return params["length"] * flop(params["jaxpr"])
    if name == "while":  # the number of rounds is not known: one
        return flop(params["body_jaxpr"])
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr") if k in params), None)
    return flop(inner, wanted) if inner is not None else 0


def _product_flop(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    inner = math.prod(shape[axis] for axis in contracted)
    return 2 * equation.outvars[0].aval.size * inner


def _convolution_flop(equation: Any) -> int:
    params = equation.params
    kernel, outputs = equation.invars[1].aval, equation.outvars[0].aval
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    products = outputs.size * (kernel.size // features)
    return 2 * products // math.prod(params["lhs_dilation"])
