"""Names of tensors in files of weights: which are needed, what stands before them."""

import re
from collections import Counter
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from qpenet_jax.backbones.torch_files import Tensors
from qpenet_jax.core.errors import InputError

NAMED, NAME_CHARACTERS = 3, 120
"""How many names of a kind an error lists, and how much of each."""


def check_tensors(
    what: str, expected: dict[str, tuple[int, ...]], tensors: Tensors
) -> None:
    """Raises one InputError with what is wrong: the first names, and how many more."""
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
    found = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{what}: {'; '.join(found)}")


def listed(names: list[str]) -> str:
    """Returns the first names, each in one short line, and how many more there are."""
    first = (" ".join(name.split())[:NAME_CHARACTERS] for name in names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(first) + more


def under_prefix(tensors: Tensors, expected: Collection[str]) -> Tensors:
    """Returns the tensors whose names follow the prefix that most expected names have.

    Training codes put a network into another, and "backbone.", "module.encoder." and
    the like before its names; what lies outside is no part of it. Without such a prefix
    all tensors are returned.

    Raises:
        InputError: the whole network is there under two prefixes.
    """
    found: Counter[str] = Counter()
    for name in tensors:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name[:200]))):
            found[name[:start]] += name[start:] in expected
    whole = [prefix for prefix, count in found.items() if count == len(expected)]
    if len(whole) > 1:
        raise InputError(
            f"the weights hold the network {len(whole)} times, under "
            f"{' and '.join(map(repr, whole[:2]))}: save one of them alone"
        )
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    if not prefix or not count:
        return tensors
    return {
        n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
    }


def _is_finite(array: np.ndarray) -> bool:
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return bool(is_real and np.isfinite(array.astype(np.float32)).all())
