"""What a command finds around it: paths, home, devices, a terminal, a closed pipe."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_cli import refused

from qpenet_jax import InputError, load_backbone
from qpenet_jax.config import default_config
from qpenet_jax.runs.build import complete

ROOT = Path(__file__).resolve().parents[1]

CLI = ("-m", "qpenet_jax.cli")

ELSEWHERE = ("gs://bucket/x", "s3://bucket/x", "https://example.org/x")

PATHS = (
    "train --config @ --workdir=@",
    "evaluate --workdir=@ --episode-list @ --out @",
    "episodes export --workdir=@ --out=@",
    "episodes export --config=@ --out=@",
    "figures --workdir @ @ --out=@",
    "predict --workdir=@ --support=a:b --query @ @ --out=@",
    "predict --weights=@ --support=a:b --query=c --out=x",
    "compare @ @ --out=@",
    "convert @ --backbone=resnet50 --out=@",
    "convert @ --fold=0 --as-run=@",
    "reproduce table3 --config=@ --workdir=@",
    "benchmark --config=@ --out=@",
    "prepare folder @ --out=@",
    "prepare pascal --voc=@ --sbd=@ --masks=@ --pool=@",
    "prepare coco --images @ @",
    "prepare coco --annotations @ @",
)
"""Words of commands; @ is a path."""


@pytest.mark.parametrize("command", PATHS)
def test_an_address_is_refused_wherever_a_path_is_asked_for(capsys, command):
    parts = command.split("@")
    for place in range(1, len(parts)):
        before, after = "a".join(parts[:place]), "a".join(parts[place:])
        for address in ELSEWHERE:
            error = refused(capsys, *f"{before}{address}{after}".split())
            assert f"{address}: only files of this machine" in error


@pytest.mark.parametrize("field", ["dataset.root", "backbone.weights"])
def test_paths_of_the_config_may_start_at_home(tmp_path, capsys, field):
    train = ["train", "--config", ROOT / "configs" / "pascal_fold0.py"]
    root = [f"--config.dataset.root={tmp_path}"] if field != "dataset.root" else []
    word = f"--config.{field}"
    run = tmp_path / "r"
    error = refused(capsys, *train, *root, f"--workdir={run}", word, "~/qpenet_none")
    assert f"{Path.home()}/qpenet_none" in error or field != "dataset.root"
    assert "only files of this" in refused(capsys, *train, f"{word}=gs://bucket/x")
    assert not run.exists()
    assert not Path("~").exists()


def started(*arguments, text=True, **environment):
    """Starts Python in a process of its own, without this one's surroundings."""
    kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    words = [sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=text, env=environment)


@pytest.mark.parametrize(
    ("platform", "command"),
    [("nonsense", ["describe", "--side=33"]), ("nonsense,cpu", ["compare", "a", "b"])],
)
def test_a_device_that_isnt_there_is_one_line(platform, command):
    done = started(*CLI, *command, JAX_PLATFORMS=platform)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={platform} can't be used: ")
    assert line.endswith("set JAX_PLATFORMS=cpu, or install JAX for this device")


def test_neither_home_nor_64_bits_matter():
    plain = started(*CLI, "describe", "--side=33")
    other = started(*CLI, "describe", "--side=33", JAX_ENABLE_X64="1")
    assert other.returncode == 0, other.stderr
    assert "float32" in other.stdout
    assert other.stdout == plain.stdout


@pytest.mark.parametrize(
    ("arguments", "code"), [(["describe", "--side=33"], 141), (["--help"], 0)]
)
def test_nobody_reading_the_output_is_no_error(arguments, code):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *CLI, *arguments], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == code


SAYS = """
from qpenet_jax.cli import main, train
train.run = lambda args: print("gaver\\u017e \\ud800 cat")
main.main(["train", "--config=x"])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cant_show_are_replaced(encoding):
    done = started("-c", SAYS, text=False, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    shown = "\u017e".encode(encoding, "replace")
    assert done.stdout.strip() == b"gaver" + shown + b" ? cat"


def test_a_program_that_set_64_bits_is_one_line():
    """Commands switch it off; a program may need it elsewhere."""
    before = jax.config.values["jax_enable_x64"]
    jax.config.update("jax_enable_x64", True)
    try:
        for start in (
            lambda: complete(default_config()),
            lambda: load_backbone("resnet50", "none.pth"),
        ):
            with pytest.raises(InputError, match="set to 64 bits"):
                start()
    finally:
        jax.config.update("jax_enable_x64", before)
