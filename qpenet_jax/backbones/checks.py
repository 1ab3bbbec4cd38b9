"""Whether tensors are those that a network needs; all that is wrong in one error."""

import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.torch_files import Tensors
from qpenet_jax.core.errors import InputError


def check_tensors(
    what: str, expected: dict[str, tuple[int, ...]], tensors: Tensors
) -> None:
    """Raise one InputError with the full lists of what is wrong."""
    common = [name for name in expected if name in tensors]
    shapes = {name: tuple(tensors[name].shape) for name in common}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "not known": [name for name in tensors if name not in expected],
        "wrong shape": [
            f"{name} {shapes[name]} instead of {expected[name]}"
            for name in common
            if shapes[name] != expected[name]
        ],
        "not finite or not real": [n for n in common if not _is_finite(tensors[n])],
        # 0 happens (a dead channel's variance underflows); epsilon takes care of it
        "negative variance": [
            name
            for name in common
            if name.endswith(("running_var", "/var")) and (tensors[name] < 0).any()
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{what}: {'; '.join(found)}")


def _is_finite(array: np.ndarray) -> bool:
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return bool(is_real and np.isfinite(array.astype(np.float32)).all())
