"""The check of types and shapes at every call that the tests turn on (conftest.py)."""

from typing import Any, Literal

from beartype import BeartypeConf, FrozenDict, beartype

# Values that a user gives are checked by the functions themselves, with a message.
CHOSEN_BY_USERS: Any = (
    Literal["blocks", "strided"],
    Literal["error", "drop"],
    Literal["large", "any"],
    Literal["original", "input", "exact"],
    Literal["pad", "squash"],
    Literal["shuffled", "list", "pairs", "classes"],
)

checked = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int may stand for a float, as for type checkers
        hint_overrides=FrozenDict(dict.fromkeys(CHOSEN_BY_USERS, str)),
    )
)
