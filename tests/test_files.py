"""Where caches lie, whose compilation cache counts, and what a lock keeps out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import no_file_above

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import (
    cache_folder,
    local_path,
    locked,
    refuse_overwriting,
    walk,
    write_whole,
)


def printed(code, **environment):
    """Return what a fresh process prints."""
    unset = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
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


def test_a_path_may_start_at_the_home_folder():
    assert local_path("~/r") == Path.home() / "r"
    assert local_path(Path("~")) == Path.home()
    assert local_path("a/~/b") == Path("a/~/b")


@pytest.mark.parametrize(
    "text", ["gs://bucket/run", "s3://b", "https://x.org/a.png", "file:///tmp/x"]
)
def test_an_address_is_no_path(text):
    for given in (text, Path(text)):
        with pytest.raises(InputError, match="only files of this machine"):
            local_path(given)


def test_a_path_that_is_none_is_refused():
    with pytest.raises(InputError, match="path is empty"):
        local_path("")
    with pytest.raises(InputError, match="~nobody_here/r: no such home folder"):
        local_path("~nobody_here/r")


def test_no_output_is_an_input_whatever_it_is_called(tmp_path):
    folder, photo = tmp_path / "photos", tmp_path / "photos" / "a.png"
    folder.mkdir()
    photo.write_bytes(b"photo")
    (tmp_path / "soft.png").symlink_to(photo)
    (tmp_path / "hard.png").hardlink_to(photo)
    (tmp_path / "linked").symlink_to(folder)
    same = [photo, folder / ".." / "photos" / "a.png", tmp_path / "linked" / "a.png"]
    same += [tmp_path / "soft.png", tmp_path / "hard.png"]
    for output in same:
        with pytest.raises(InputError, match=r"over the input .*a\.png: choose"):
            refuse_overwriting([tmp_path / "new.png", output], [photo])
    free = [folder / "b.png", tmp_path / "a.png", tmp_path / "photos2" / "a.png"]
    refuse_overwriting(free, [photo, tmp_path / "missing.png"])
    for output in (
        folder,
        folder / "b.png",
        folder / "new" / "b",
        tmp_path / "linked/c",
    ):
        with pytest.raises(InputError, match="photos"):
            refuse_overwriting([output], [folder])


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_walk_follows_links_and_ends(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root / "b.png", root / "sub/a.png", root / "a/x.png", elsewhere / "c/d.png")
    touch(root / "._b.png", root / ".hidden/e.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)  # twice, by two names
    (elsewhere / "c/back").symlink_to(root)  # a circle
    (root / "sub/self").symlink_to(root / "sub")
    (root / "one.png").symlink_to(elsewhere / "c/d.png")
    found = walk(root)
    assert list(found) == [
        *("a/x.png", "again/c/d.png", "b.png", "linked/c/d.png", "one.png"),
        "sub/a.png",
    ]
    assert all(path.is_file() for path in found.values())
    assert list(walk(root, recursive=False)) == ["b.png", "one.png"]
    (tmp_path / "link").symlink_to(root)
    assert list(walk(tmp_path / "link")) == list(found)


def test_a_walk_leaves_nothing_out_silently(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone\.png is a link to nothing"):
        walk(tmp_path)
    (tmp_path / "gone.png").unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop is a link to nothing"):
        walk(tmp_path)

    (tmp_path / "loop").unlink()
    touch(tmp_path / os.fsdecode(b"\xff.png"))
    with pytest.raises(InputError, match=r"'\\udcff\.png' in .*: rename it"):
        walk(tmp_path)

    with pytest.raises(InputError, match=r"can't be read \(File name too long\)"):
        walk(tmp_path / ("x" * 300))


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with no_file_above(10), pytest.raises(InputError, match=r"a.json.*make room"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
