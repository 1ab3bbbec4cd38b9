"""Commands on a finished run: evaluate, episodes, compare, figures, predict."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, SHRUNK, assert_refused, overrides, passed, qpenet
from PIL import Image

from qpenet_jax import load
from qpenet_jax.core.files import locked
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.paper.sheets import SHEETS
from qpenet_jax.training.train import LOCK_FILE

pytestmark = pytest.mark.standard_promotion


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_evaluate_scores_shots_and_seeds(finished, tmp_path):
    workdir, _ = finished
    arguments = ("evaluate", "--workdir", workdir, "--out", tmp_path, "--episodes", 3)
    with locked(workdir / LOCK_FILE, "free before"):  # as if it was being trained
        result = passed(*arguments, "--shots", "1,2", "--seeds", "0,1", "--references")
    for shots in (1, 2):
        (folder,) = tmp_path.glob(f"default_episodes=3_*_{shots}shot")
        results = json.loads((folder / "results.json").read_text())
        assert results["protocol"]["shots"] == shots
        assert results["seeds"] == [0, 1]
        assert set(results["per_seed"]) == {"0", "1"}
        assert results["step"] == 4
        assert set(results["references"]) == {"untrained", "cosine"}
        rows = (folder / "episodes_qpenet.csv").read_text()
        assert len(rows.splitlines()) == 1 + 2 * 3
    assert "2-shot" in result.stdout
    assert "default, but episodes=3 seeds=0,1 min_pixels=64 side=65" in result.stdout


def test_a_published_protocol_with_one_field_changed(finished, tmp_path):
    out = ("--episodes", 2, "--out", tmp_path)
    result = passed("evaluate", "--workdir", finished[0], "--protocol", "hsnet", *out)
    assert "hsnet, but exclude_novel=True episodes=2 min_pixels=64" in result.stdout
    assert "pairs queries" in result.stdout
    assert "input 401 (squash)" in result.stdout


def test_frozen_episodes_are_scored_exactly_and_compared(finished, tmp_path):
    workdir, _ = finished
    listed = tmp_path / "lists" / "episodes.csv"
    export = ("episodes", "export", "--workdir", workdir, "--out", listed)
    assert "sha256" in passed(*export, "--episodes", 5, "--seeds", "3,4").stdout
    evaluate = ("evaluate", "--workdir", workdir)
    common = (*evaluate, "--episode-list", listed)
    passed(*common, "--out", tmp_path / "a")
    passed(*evaluate, "--episodes", 5, "--seeds", "3,4", "--out", tmp_path)
    (a,), (b,) = (tmp_path / "a").iterdir(), tmp_path.glob("default_*_1shot")
    rows = [(folder / "episodes_qpenet.csv").read_text() for folder in (a, b)]
    assert rows[0] == rows[1]

    compare = ("compare", a / "results.json", b / "results.json")
    assert_refused(qpenet(*compare), "episode_list")
    assert "10" in passed(*compare, "--different-protocols").stdout
    assert "mIoU" in passed("compare", compare[1], compare[1]).stdout

    assert_refused(qpenet(*evaluate, "--side", 100), "8 n + 1")
    assert_refused(qpenet(*common, "--episodes", 3), "--episodes", "--episode-list")
    typo = qpenet(*export, "--protcol", "paper")
    assert typo.returncode == 2
    assert "--protcol" in typo.stderr
    base = tmp_path / "base.csv"
    swapped = ("--config.dataset.fold=1", "--config.dataset.min_pixels=64")
    small = overrides(**{k: SHRUNK[k] for k in SHRUNK if k.startswith("dataset")})
    config = ("episodes", "export", "--config", "configs/quickstart.py")
    passed(*config, *small, *swapped, "--out", base)
    refused = qpenet(*evaluate, "--episode-list", base, "--out", tmp_path)
    assert_refused(refused, "novel in fold 0")
    listed.write_text(listed.read_text().replace(",1,", ",2,", 1))
    assert_refused(qpenet(*common), str(listed), "changed")


def test_export_reads_a_config_with_overrides(tmp_path):
    listed, other = tmp_path / "episodes.csv", tmp_path / "other.csv"
    fields = ("dataset.val_images=60", "dataset.min_pixels=100", "dataset.side=65")
    small = [f"--config.{field}" for field in (*fields, "eval.episodes=4")]
    export = ("episodes", "export", "--config", "configs/quickstart.py")
    passed(*export, "--out", listed, *small)
    assert len(listed.read_text().splitlines()) == 1 + 1 + 4
    bad = qpenet(*export, "--out", other, "--config.nope=1")
    assert_refused(bad, "nope", "qpenet_jax/config.py")
    assert not other.exists()


def test_figures_are_drawn_of_a_run(finished, tmp_path):
    command = ("figures", "--workdir", finished[0], "--out", tmp_path)
    result = passed(*command, "--episodes", "1,4")
    files = [tmp_path / f"{name}.jpg" for name in SHEETS]
    assert result.stdout.split() == [str(file) for file in files]
    assert all(file.exists() for file in files)
    assert_refused(qpenet(*command, "--episodes", 99), "99")


@pytest.fixture
def photos(tmp_path):
    """A support, its mask and a folder of two queries."""
    shapes, queries = Shapes("val", 3, 120), tmp_path / "queries"
    queries.mkdir()
    for i, name in enumerate(("support.png", "queries/1.png", "queries/2.png")):
        image = Image.fromarray(shapes.image(i))
        image.resize((90 + i, 70)).save(tmp_path / name)
    label = Image.fromarray((shapes.label(0) > 0).astype(np.uint8) * 255)
    label.resize((90, 70), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    return tmp_path


def test_predict_writes_masks_of_the_querys_size(finished, photos):
    workdir, out = finished[0], photos / "out"
    support = f"{photos / 'support.png'}:{photos / 'mask.png'}"
    arguments = ("predict", "--workdir", workdir, "--support", support)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    passed(*arguments, "--query", photos / "queries", "--out", out)
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert after == before, "a run may lie in a folder that can only be read"
    for i in (1, 2):
        mask = pixels_of(out / f"{i}.png")
        assert mask.shape == (70, 90 + i)
        assert set(np.unique(mask)) <= {0, 255}
        assert pixels_of(out / f"{i}_overlay.jpg").shape[:2] == (70, 90 + i)
    pixels, mask = (pixels_of(photos / name) for name in ("support.png", "mask.png"))
    found = load(workdir)(pixels_of(photos / "queries/1.png"), pixels, mask // 255)
    np.testing.assert_array_equal(255 * found, pixels_of(out / "1.png"))


PEAK = """
import resource, sys
sys.path.insert(0, "tests")
import tiny
from qpenet_jax.cli.main import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
common, small, large = sys.argv[1:-2], *sys.argv[-2:]
main([*common, "--query", small])
before = peak()
main([*common, "--query", large])
print(peak() - before)
"""


@pytest.mark.slow
def test_a_pixel_and_a_photograph_are_segmented_in_bounded_memory(finished, photos):
    dot, large = photos / "dot.png", photos / "large.jpg"
    image = Image.open(photos / "support.png")
    image.crop((0, 0, 1, 1)).save(dot)
    image.resize((8000, 6000)).save(large)
    support = f"{photos / 'support.png'}:{photos / 'mask.png'}"
    arguments = ["predict", "--workdir", finished[0], "--support", support]
    arguments += ["--out", photos / "out", dot, large]
    run = [sys.executable, "-c", PEAK, *map(str, arguments)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 2 * 2**30
    assert pixels_of(photos / "out" / "dot.png").shape == (1, 1)
    assert pixels_of(photos / "out" / "large.png").shape == (6000, 8000)
