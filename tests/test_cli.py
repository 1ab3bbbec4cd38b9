"""The subcommands that need no run, and what they refuse (see also test_train.py)."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commands import overrides
from PIL import Image
from predictors import run_predict

import qpenet_jax
from qpenet_jax.backbones.registry import BACKBONES
from qpenet_jax.cli import options
from qpenet_jax.cli.main import COMMANDS, format_warning, main
from qpenet_jax.core import choices
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.protocols import PRESETS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "orbax", "grain", "optax", "scipy", "cv2")
HEAVY += ("tensorflow_datasets", "matplotlib", "numpy", "torch")

IMPORTED = """
import contextlib, io, sys
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    exec(sys.argv[1])
print(*sys.modules)
"""


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in arguments])
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return errors[0]


def test_describe_prints_the_layers(capsys):
    main(["describe", "--backbone", "efficientnet_lite0", "--side", "33"])
    printed = capsys.readouterr().out
    for name in ("gbc", "ffa", "convs", "reduce_support", "P_global"):
        assert name in printed
    assert "9,291,016" in printed
    main(
        ["describe", "--backbone", "resnet50", "--side", "33", "--variant", "released"]
    )
    # The released network's own 13,505,984 and layer4's, frozen, without batch norm.
    assert f"{13_505_984 + 14_953_472:,}" in capsys.readouterr().out
    assert "8 n + 1" in refused(capsys, "describe", "--side", 64)
    assert "choose baseline" in refused(capsys, "describe", "--variant", "ful")


def test_a_run_that_is_none_is_refused(capsys, tmp_path):
    for command in (
        ("evaluate", "--workdir", tmp_path),
        ("predict", "--workdir", tmp_path, "--support=a:b", "--query=c", "--out=out"),
    ):
        assert str(tmp_path) in refused(capsys, *command)
    assert "whole numbers" in refused(capsys, "evaluate", "--workdir=x", "--shots=abc")


def test_predict_refuses_bad_supports_and_queries(tmp_path):
    for name, pixels in {
        "image": np.zeros((8, 9, 3), np.uint8),
        "mask": np.ones((8, 9), np.uint8),
        "empty": np.zeros((8, 9), np.uint8),
        "small": np.ones((7, 9), np.uint8),
    }.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((tmp_path / "image.png").read_bytes()[:30])
    (tmp_path / "folder").mkdir()
    for support, query, words in (
        ("image.png", "image.png", "IMAGE:MASK"),
        ("image.png:empty.png", "image.png", f"{tmp_path}/empty.png"),
        ("image.png:small.png", "image.png", "make them equal"),
        ("nothing.jpg:mask.png", "image.png", "nothing.jpg"),
        ("truncated.png:mask.png", "image.png", "truncated.png"),
        ("image.png:mask.png", "truncated.png", "truncated.png"),
        ("image.png:mask.png", "gone.png", "no such image"),
        ("image.png:mask.png", "folder", "holds no image"),
    ):
        given = ":".join(str(tmp_path / name) for name in support.split(":"))
        paths = ("--query", tmp_path / query, "--out", tmp_path / "out")
        with pytest.raises(InputError, match=words):
            run_predict(None, "--support", given, *paths)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import qpenet_jax; dir(qpenet_jax)",
        "from qpenet_jax.cli.main import main; main(['--help'])",
        "from qpenet_jax.cli.main import main; main(['evaluate', '--help'])",
        "from qpenet_jax.cli.main import main; main(['train', '--nonsense'])",
    ],
)
def test_what_needs_no_jax_imports_none(code):
    run = [sys.executable, "-c", IMPORTED, code]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    imported = result.stdout.split()
    assert "qpenet_jax" in imported
    assert not [name for name in HEAVY if name in imported]


def test_the_public_names_are_there():
    assert set(qpenet_jax.__all__) <= set(dir(qpenet_jax))
    for name in qpenet_jax.__all__:
        assert getattr(qpenet_jax, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = qpenet_jax.nothing


def test_there_is_one_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"qpenet {project['version']}\n"
    assert qpenet_jax.__version__ == project["version"]


def test_the_choices_are_the_names_of_the_librarys_tables():
    shipped = tuple(name for name in BACKBONES if name != "tiny")  # tests/tiny.py
    assert shipped == choices.BACKBONES
    assert tuple(PRESETS) == choices.PROTOCOLS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: qpenet {command}" in capsys.readouterr().out


def test_overrides_are_distinguished_from_options():
    words = ["train", "--config.a", "1", "--config", "x.py", "--config.b.c=2"]
    words += ["--noconfig.d", "--workdir=w", "--config.e", "-3", "--check"]
    rest, overrides = options.split_overrides(words)
    assert rest == ["train", "--config", "x.py", "--workdir=w", "--check"]
    expected = ["--config.a", "1", "--config.b.c=2", "--noconfig.d", "--config.e", "-3"]
    assert overrides == expected


def test_overrides_are_refused_where_there_is_no_config(capsys):
    error = refused(capsys, "compare", "a.json", "b.json", "--config.side=9")
    assert "--config.side=9" in error
    assert "--config" in refused(capsys, "benchmark", "data", "--config.side=9")


def test_no_output_is_written_over_or_into_what_it_is_made_of(capsys, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        out = tmp_path / part / "x"
        error = refused(capsys, "prepare", "folder", tmp_path, "--out", out)
        assert f"into {tmp_path / part}, which is read" in error
        assert not out.exists()
    file = tmp_path / "resnet50.safetensors"
    file.write_bytes(b"original")
    error = refused(capsys, "convert", file, "--backbone=resnet50", "--out", tmp_path)
    assert f"over the input {file}" in error
    assert file.read_bytes() == b"original"


def test_an_episode_list_never_replaces_its_config_or_an_image(
    capsys, tmp_path, write_voc
):
    root = write_voc(tmp_path / "voc", images=8, classes=4)
    config, ids = tmp_path / "my.py", root / "ids.txt"
    shutil.copy(ROOT / "configs" / "pascal_fold0.py", config)
    fields = {"kind": "voc", "root": root, "train_ids": ids, "val_ids": ids}
    fields = {f"dataset__{name}": value for name, value in fields.items()}
    fields |= {"backbone__name": "efficientnet_lite0", "backbone__weights": ""}
    words = ["--config", config, *overrides(**fields)]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    image = root / "JPEGImages" / "im_000.jpg"
    for out in (config, ids, image, image.with_name("new.csv")):
        error = refused(capsys, "episodes", "export", *words, "--out", out)
        assert "would be written" in error
    workdir = root / "SegmentationClassAug" / "run"
    error = refused(capsys, "train", *words, "--workdir", workdir)
    assert f"into {workdir.parent}, which is read" in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_messages_and_warnings_are_one_line_that_can_be_read():
    """A file's own values may be in it."""
    assert str(InputError("a\nb: it is wrong")) == "a b: it is wrong"
    text = str(InputError(f"a.json: the field {'x' * 9999} is unknown; mend it"))
    assert len(text) < 700
    assert text.startswith("a.json: the field xxx")
    assert text.endswith("xxx is unknown; mend it")
    shown = format_warning("Corrupt EXIF data", UserWarning, Image.__file__, 10)
    assert shown == "warning: an image: Corrupt EXIF data\n"
    other = format_warning("Odd", UserWarning, "/a/b.py", 10, "x")
    assert other.startswith("/a/b.py:10: UserWarning: Odd")
