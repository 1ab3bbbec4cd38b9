"""The one error that a user can mend: it names the file or value and the remedy."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input (a path, an image, a weight file, an option), told in one line."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        sys.exit(_report(error))


def _report(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
