"""The one error that a user can mend: it names the file or value and the remedy."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LONGEST_MESSAGE = 600
"""Characters that fit into a few lines of a terminal; a file's values may be longer."""


class InputError(ValueError):
    """Bad input (a path, an image, a weight file, an option), described in one line.

    Line breaks become spaces, and the middle of what is too long is left out: the start
    names the file, the end the remedy.
    """

    def __init__(self, message: str):
        text = " ".join(message.splitlines())
        if len(text) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            text = f"{text[:half]} [...] {text[-half:]}"
        super().__init__(text)


class InputWarning(UserWarning):
    """Input that may mean something else than it is taken for, in one line."""


def check_choice(what: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a value that is none of the choices; `what` names it: "config.dtype=".

    Raises:
        InputError: with all choices.
    """
    known = tuple(choices)
    if value not in known:
        listed = ", ".join(map(str, known))
        raise InputError(f"{what}{value!r}: choose {listed}")


def reason(error: Exception) -> str:
    """Returns in a few words what an exception says."""
    if isinstance(error, KeyError):
        return f"no {error} in it"
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def refused_as(
    fault: str, remedy: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turns what the reading of a bad file raises into one line.

    Raises:
        InputError: in place of one of the `errors`, and of a file that isn't there.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; check the path") from None
    except errors as error:
        raise InputError(f"{fault} ({reason(error)}); {remedy}") from None


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where a disk, a quota or the largest file size is full."""

MAKE_ROOM = "make room, then run the same command again"

BROKEN_PIPE = 128 + 13
"""The exit code of a program that SIGPIPE has ended, as the shell shows it."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` or an error of the file system into one line, exits 2.

    Where nobody reads the output any more (`| head`), the end is quiet.
    """
    try:
        yield
        _flush()
        return
    except SystemExit:
        _finish_output()
        raise
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        _finish_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        message = f"{error.filename or 'while writing'}: {error.strerror}"
        if error.errno in NO_ROOM:
            message += f"; {MAKE_ROOM}"
    _finish_output()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _finish_output() -> None:
    """Prints what is left, or gives it up: Python would try again at exit."""
    try:
        _flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
