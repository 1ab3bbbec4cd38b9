"""The one error that a user can mend: it names the file or value and the remedy."""

import contextlib
import errno
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class InputError(ValueError):
    """Bad input (a path, an image, a weight file, an option), told in one line."""


def check_choice(what: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is none of the choices; `what` names it, say "config.dtype=".

    Raises:
        InputError: with all choices.
    """
    known = tuple(choices)
    if value not in known:
        listed = ", ".join(map(str, known))
        raise InputError(f"{what}{value!r}: choose {listed}")


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` or an error of the file system into one line, exit 2."""
    try:
        yield
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        message = f"{error.filename or 'while writing'}: {error.strerror}"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
