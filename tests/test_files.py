"""Where caches lie, what a lock keeps out, which paths are taken, what a walk finds."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

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

PLACE = """
import jax
from qpenet_jax.core.runtime import keep_compilations
keep_compilations()
print(jax.config.values["jax_compilation_cache_dir"])
"""


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("XDG_CACHE_HOME", "{}/qpenet_jax/xla"),
        ("JAX_COMPILATION_CACHE_DIR", "{}"),  # what the user chose is kept
    ],
)
def test_compilations_are_kept_among_the_users_caches(variable, place, tmp_path):
    kept = {k: os.environ[k] for k in ("PATH", "PYTHONPATH") if k in os.environ}
    chosen = {"JAX_PLATFORMS": "cpu", variable: str(tmp_path)}
    code = [sys.executable, "-c", PLACE]
    found = subprocess.check_output(code, text=True, env=kept | chosen)
    assert found.strip() == place.format(tmp_path)


def test_no_home_is_needed(monkeypatch):
    """Neither HOME nor, as for a user of a container, an entry of the user."""
    homeless = Mock(side_effect=RuntimeError("Could not determine home directory."))
    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    assert cache_folder("xla") == Path(tempfile.gettempdir()) / "qpenet_jax" / "xla"


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


def test_a_path_may_start_at_the_home_folder_and_is_no_address():
    assert local_path("~/r") == Path.home() / "r"
    assert local_path(Path("~")) == Path.home()
    assert local_path("a/~/b") == Path("a/~/b")
    for text, words in (
        ("gs://bucket/run", "only files of this machine"),
        ("s3://b", "only files of this machine"),
        (Path("https://x.org/a.png"), "only files of this machine"),
        ("file:///tmp/x", "only files of this machine"),
        ("", "path is empty"),
        ("~nobody_here/r", "~nobody_here/r: no such home folder"),
    ):
        with pytest.raises(InputError, match=words):
            local_path(text)


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
    for output in (folder, folder / "b.png", folder / "new/b", tmp_path / "linked/c"):
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
