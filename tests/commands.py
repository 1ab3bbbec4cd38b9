"""Commands called as functions, as a user gives them."""

import contextlib
import io
import subprocess
from pathlib import Path

import jax

from qpenet_jax.cli.main import main
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config

ROOT = Path(__file__).resolve().parents[1]

SHRUNK = {
    "side": 65,
    "steps": 4,
    "batch_size": 2,
    "workers": 0,
    "log_every": 1,
    "save_every": 1,
    "model__channels": 16,
    "dataset__side": 65,
    "dataset__train_images": 60,
    "dataset__val_images": 40,
    "dataset__min_pixels": 64,
    "dataset__on_few": "drop",
    "eval__every": 4,
    "eval__episodes": 6,
}
"""Fields that make a config of `configs/` one of seconds."""


def overrides(**fields):
    """Return words of the command line; in names `__` stands for a dot."""
    return [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]


def tiny(workdir, **fields):
    """Return the words that train tests/tiny.py."""
    files = ["--config", f"{ROOT}/tests/tiny.py", "--workdir", str(workdir)]
    return ["train", *files, *overrides(**fields)]


def tiny_config(**fields):
    """Return the complete config of tests/tiny.py with some fields changed."""
    return complete(load_config(ROOT / "tests" / "tiny.py", overrides(**fields)))


def words(workdir, config="quickstart", **changes):
    """Return the words that train a config of `configs/`, shrunk."""
    files = ["--config", f"configs/{config}.py", "--workdir", str(workdir)]
    return [*files, *overrides(**SHRUNK, **changes)]


def qpenet(*arguments):
    """Run a command in this process; return what it printed and its exit code."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(ROOT),
        jax.numpy_dtype_promotion("standard"),  # as users have it
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(
        arguments, code, out.getvalue(), errors.getvalue()
    )


def passed(*arguments):
    """Run a command that has to pass; return what it printed."""
    result = qpenet(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def assert_refused(result, *words):
    """Check for the one line of a refusal, with these words in it."""
    assert result.returncode == 2, result.stderr
    # Python's resource tracker may add a warning about Grain's shared memory after it.
    (line,) = [s for s in result.stderr.splitlines() if s.startswith("error: ")]
    for word in words:
        assert word in line
    assert "Traceback" not in result.stderr
