"""Fields of nested mappings by their dotted names."""

import difflib
from collections.abc import Mapping
from typing import Any


def fields_like(name: str, config: Any) -> list[str]:
    """Returns the fields of `config` that a wrong name may stand for.

    Those of the same name in other parts, or else those that are spelt alike.
    """
    known, leaf = list(flat(config.to_dict())), name.rpartition(".")[2]
    alike = [field for field in known if field.rpartition(".")[2] == leaf]
    return alike or difflib.get_close_matches(name, known, n=3)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns fields by their dotted names."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= (
            flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
        )
    return found
