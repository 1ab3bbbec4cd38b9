"""The one error that a user can mend: it names the file or value and the remedy."""

import contextlib
import errno
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input (a path, an image, a weight file, an option), told in one line."""


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
