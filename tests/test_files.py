"""Where caches lie, whose compilation cache counts, and what a lock keeps out."""

import os
import subprocess
import sys

import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import cache_folder, locked


def printed(code, **environment):
    """Return what a fresh process prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CACHE = """
import jax
from qpenet_jax.core.runtime import keep_compilations
keep_compilations()
print(jax.config.values["jax_compilation_cache_dir"])
"""


def test_compilations_are_kept_among_the_users_caches(tmp_path):
    found = printed(CACHE, XDG_CACHE_HOME=str(tmp_path))
    assert found == str(tmp_path / "qpenet_jax" / "xla")


def test_a_compilation_cache_that_the_user_chose_is_kept(tmp_path):
    chosen = str(tmp_path / "mine")
    assert printed(CACHE, JAX_COMPILATION_CACHE_DIR=chosen) == chosen


def test_no_home_is_needed(monkeypatch, tmp_path):
    """Neither HOME nor, as for a user of a container, an entry of the user."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: _unknown())
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder("xla") == tmp_path / "qpenet_jax" / "xla"
    code = "from qpenet_jax.core.files import cache_folder; print(cache_folder('xla'))"
    assert os.path.isabs(printed(code))


def _unknown():
    raise RuntimeError("Could not determine home directory.")


def test_a_lock_keeps_other_processes_out_until_its_process_ends(tmp_path):
    lock = tmp_path / "new" / "lock"
    holder = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from qpenet_jax.core.files import locked\n"
        f"with locked(Path({str(lock)!r}), 'busy'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"^busy$"), locked(lock, "busy"):
            pass
        process.kill()
        process.wait()
    with locked(lock, "busy"):
        pass
