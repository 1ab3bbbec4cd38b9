"""The check of types and shapes at every call that the tests turn on (conftest.py)."""

from typing import Any, Literal, get_args

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import _typeguard

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


def of_class(accepts):
    """Return a check that an argument is of a class that the function names."""
    (leaf,) = accepts.__annotations__.values()
    classes = get_args(leaf) or (leaf,)

    def check(x):
        if not any(isinstance(x, known) for known in classes):
            raise TypeError

    return check


# jaxtyping checks the leaves of a PyTree by a general way, which took a tenth of a run.
# The leaves of ours are of classes.
_typeguard.typechecked = of_class
