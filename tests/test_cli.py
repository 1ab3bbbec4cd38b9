"""The subcommands that need no run, and what they refuse (see also test_train.py)."""

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from qpenet_jax.cli.main import main


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
    assert "8 n + 1" in refused(capsys, "describe", "--side", 64)


def test_a_malicious_weight_file_is_refused(capsys, tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("owned",)

    file, out = tmp_path / "evil.pth", tmp_path / "out"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Attack(), protocol=2))
    error = refused(capsys, "convert", file, "--backbone", "resnet50", "--out", out)
    assert str(file) in error
    assert "print" in error
    assert not out.exists() or not list(out.iterdir())


def test_a_run_that_is_none_is_refused(capsys, tmp_path):
    for command in (
        ("evaluate", "--workdir", tmp_path),
        ("predict", "--workdir", tmp_path, "--support=a:b", "--query=c", "--out=out"),
    ):
        assert str(tmp_path) in refused(capsys, *command)
    assert "whole numbers" in refused(capsys, "evaluate", "--workdir=x", "--shots=abc")


def test_predict_tells_bad_supports_and_queries(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("qpenet_jax.cli.main.load", lambda workdir: None)
    image, mask, empty, small = (tmp_path / f"{n}.png" for n in "imes")
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(image)
    Image.fromarray(np.ones((8, 9), np.uint8)).save(mask)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(empty)
    Image.fromarray(np.ones((7, 9), np.uint8)).save(small)

    def error(support, query=image):
        out = tmp_path / "out"
        text = refused(
            capsys, "predict", "--workdir", "run", "--support", support,
            "--query", query, "--out", out,
        )  # fmt: skip
        assert not out.exists()
        return text

    assert "IMAGE:MASK" in error(image)
    assert f"{empty}" in error(f"{image}:{empty}")
    assert "make them equal" in error(f"{image}:{small}")
    assert "nothing.jpg" in error(f"{tmp_path}/nothing.jpg:{mask}")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(image.read_bytes()[:30])
    assert "truncated.png" in error(f"{image}:{mask}", truncated)
    assert "truncated.png" in error(f"{truncated}:{mask}")
    assert "no such image" in error(f"{image}:{mask}", tmp_path / "gone.png")
    (tmp_path / "folder").mkdir()
    assert "holds no image" in error(f"{image}:{mask}", tmp_path / "folder")
