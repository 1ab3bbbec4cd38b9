"""The paper's tables: what is planned, skipped, refused and made of the episodes.

Where a run's training doesn't matter a stand-in writes what it would leave behind.
"""

import contextlib
import io
import itertools
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import numpy as np
import pytest

from qpenet_jax.cli.main import main
from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.metrics import Scores, estimate
from qpenet_jax.evaluation.report import summarize, write_json
from qpenet_jax.models.qpenet import QPENet
from qpenet_jax.models.variants import VARIANTS
from qpenet_jax.paper.plan import FOLD_COLUMNS, FOLD_RESULTS, PROGRAM, Plan
from qpenet_jax.paper.plan import VARIANT_RESULTS as PAPER
from qpenet_jax.paper.reproduce import STEP, last_error, print_plan, reproduce
from qpenet_jax.paper.tables import Found, mean_over_folds, measured, pooled, verdict
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.datasets import build_dataset, build_protocol
from qpenet_jax.runs.evaluator import folder_name, scored_episodes
from qpenet_jax.runs.folder import claim, inputs_of, read_config

# Of ml_collections, where it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "tiny.py"
SUBSET = "--config.eval.subset=('disc','star')"
ROWS = ("fgpe_ffa", "full")


def overrides(**changes):
    fields = {"eval__references": False, "dataset__val_images": 80} | changes
    return commands.overrides(**fields)


TABLE3 = {"rows": ROWS, "seeds": (0, 1), "overrides": [*overrides(), SUBSET]}
TABLE1 = {"backbones": ("tiny",), "folds": (0, 1), "overrides": overrides()}
ONE_RUN = {"rows": ("full",), "seeds": (0,), "overrides": overrides()}


def process_until_it_trains(command, folder):
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipe)
    log, deadline = folder / "train.log", time.monotonic() + 300
    while not log.exists() or "training:" not in log.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def plan(table, workdir, options, config=CONFIG):
    return Plan(table, config, workdir, **options)


def words(*arguments):
    """Return what a page gives as the command, after `qpenet`."""
    return shlex.split(plan(*arguments).command)[1:]


def scores_of(found, queries, class_ids):
    """Return episodes with these intersections; all else is alike."""
    columns = (0, np.arange(len(found)), queries, class_ids, 8000, 9000, found, 1000)
    return Scores(np.stack(np.broadcast_arrays(*columns), 1).astype(np.int64))


def stand_in(command, log):
    """Leave the files that a training or an evaluation would, with made-up scores."""
    options = dict(itertools.pairwise(command))
    folder = Path(options["--workdir"])
    if "train" in command:
        fields = [word for word in command if word.startswith("--config.")]
        config, out = complete(load_config(options["--config"], fields)), folder
        val = build_dataset(config, "val")
        try:
            claim(folder, config, inputs_of(val, val, {}))
        except InputError as error:
            log.write(f"error: {error}\n".encode())
            return 2
        protocol = build_protocol(config)
    else:
        config = complete(read_config(folder))
        val = build_dataset(config, "val")
        protocol = build_protocol(config, shots=int(options["--shots"]))
        out = Path(options["--out"]) / folder_name(protocol)
        out.mkdir(parents=True)
    protocol, (sampler, *_), class_ids, _ = scored_episodes(config, val, protocol)
    episodes = [sampler(i) for i in range(protocol.episodes)]
    rng = np.random.default_rng(len(config.variant) + config.seed)
    found = rng.integers(300, 900, len(episodes))
    queries, classes = zip(*((e.query, e.class_id) for e in episodes), strict=True)
    scores = scores_of(found, queries, classes)
    scores.save(out / "episodes_qpenet.csv")
    subset = [name for name in config.eval.subset if name in protocol.classes]
    results = summarize(scores, protocol, class_ids, subset)
    facts = {"class_ids": list(class_ids), "device": "a device"}
    write_json(out / "results.json", results | facts)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Table III, stopped by Ctrl-C in its second run, then the same command again."""
    workdir, out = tmp_path_factory.mktemp("table3") / "runs", io.StringIO()

    def until_ctrl_c(command, log):
        if workdir / "fgpe_ffa" / "seed1" in map(Path, command):
            raise KeyboardInterrupt
        return stand_in(command, log)

    with pytest.raises(KeyboardInterrupt, match="stopped: the same command goes on"):
        reproduce(plan("table3", workdir, TABLE3), run_process=until_ctrl_c)
    assert not (workdir / "table3.md").exists()
    with contextlib.redirect_stdout(out):
        reproduce(plan("table3", workdir, TABLE3), run_process=stand_in)
    return workdir, out.getvalue()


def scored(folder):
    """Return what a run's results.json holds, by the table's columns."""
    results = json.loads((folder / "results.json").read_text())
    means = {"mIoU": results["miou"], "FB-IoU": results["fb_iou"]}
    if "subset" in results:
        means["mIoU of disc, star"] = results["subset"]["miou"]
    return means


def test_the_table_holds_what_the_runs_scored(finished):
    workdir, _ = finished
    section = json.loads((workdir / "table3.json").read_text())["sections"]["1"]
    page = (workdir / "table3.md").read_text()
    for variant, row in section["rows"].items():
        folders = [workdir / variant / f"seed{seed}" for seed in (0, 1)]
        configs = map(read_config, folders)
        assert [(c.variant, c.seed) for c in configs] == [(variant, 0), (variant, 1)]
        first, second = map(scored, folders)
        assert row.keys() == first.keys()
        line = next(s for s in page.splitlines() if s.startswith(f"| {variant} "))
        for measure, figure in row.items():
            values, (low, high) = [first[measure], second[measure]], figure["interval"]
            assert figure["by_seed"] == values
            mean, std = statistics.mean(values), statistics.stdev(values)
            np.testing.assert_allclose(figure["ours"], mean, atol=0.006)
            np.testing.assert_allclose(figure["std"], std, atol=0.01)
            assert low - 0.01 <= figure["ours"] <= high + 0.01
            assert f"{figure['ours']:.1f} [{low:.1f}, {high:.1f}]" in line
        papers = row["mIoU"]["paper"], row["FB-IoU"]["paper"]
        assert papers == PAPER["table3"][variant][:2]
    for measure, difference in section["differences"]["fgpe_ffa - full"].items():
        a, b = (section["rows"][variant][measure]["ours"] for variant in ROWS)
        np.testing.assert_allclose(difference["ours"], a - b, atol=0.02)
        assert difference["paper"] == -0.4
        assert difference["order"] in ("holds", "contrary", "undecided")


def test_lines_of_runs_columns_and_circumstances(finished):
    workdir, out = finished
    page = (workdir / "table3.md").read_text()
    assert page in out
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert lines[0].startswith("[1/4] fgpe_ffa seed0: done before, mIoU ")
    names = ("fgpe_ffa seed1", "full seed0", "full seed1")
    for number, (line, name) in enumerate(zip(lines[1:], names, strict=True), 2):
        assert line.startswith(f"[{number}/4] {name}: mIoU ")
        assert line.endswith(" min")
    cells = [[c.strip() for c in s.split("|")[1:-1]] for s in page.splitlines()]
    tables = [row for row in cells if row]
    assert tables[0][:4] == ["row", "FGPE", "BGPE", "FFA"]
    assert tables[2][:4] == ["fgpe_ffa", "✓", "", "✓"]
    assert tables[3][:4] == ["full", "✓", "✓", "✓"]
    for text in (
        "Protocol: default, but episodes=6",
        "rows of one fold and training seed were scored on the same episodes",
        "2 training seed(s) (0, 1)",
        "4 runs of 4 steps",
        "on a device",
        "Command: `qpenet reproduce table3 --config",
        "--seeds 0,1 --rows fgpe_ffa,full --config.eval.references=False",
    ):
        assert text in page


def test_the_command_skips_and_shares_what_is_done(finished, capsys):
    workdir, _ = finished
    page = (workdir / "table3.md").read_text()
    main(words("table3", workdir, TABLE3))
    printed = capsys.readouterr().out
    assert printed.count("done before, mIoU") == 4
    assert (workdir / "table3.md").read_text() == page
    main(words("table5", workdir, TABLE3 | {"rows": ("full",)}))
    assert capsys.readouterr().out.count("done before") == 2
    assert "| full | ✓               |     |" in (workdir / "table5.md").read_text()


def test_runs_that_do_not_compare_are_refused(finished, tmp_path):
    workdir = tmp_path / "runs"
    shutil.copytree(finished[0], workdir)
    run = workdir / "full" / "seed1"

    def refused(name, change, *words):
        path = run / name
        whole = path.read_text()
        content = json.loads(whole)
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            reproduce(plan("table3", workdir, TABLE3), run_process=None)
        for word in words:
            assert word in str(error.value)
        path.write_text(whole)

    alike, weights = f"{run} and the runs before it", {"backbone weights": "0"}
    other = {"scoring": "input"}
    refused("results.json", lambda r: r["protocol"].update(other), alike, "scoring")
    refused("inputs.json", lambda r: r.update(weights), alike, "backbone weights")
    images = {"validation images": "0"}  # another seed may have other ones
    refused("inputs.json", lambda r: r.update(images), alike, "validation images")
    file = str(run / "results.json")
    refused("results.json", lambda r: r.update(miou=r["miou"] + 1), file, "delete")


def test_a_run_of_another_config_fails_by_name(finished, tmp_path, capsys):
    workdir = tmp_path / "runs"
    shutil.copytree(finished[0], workdir)
    log = workdir / "full" / "seed0" / "train.log"
    options = ONE_RUN | {"overrides": [*overrides(steps=3), SUBSET]}
    with pytest.raises(InputError, match="1 of 1 runs failed"):
        reproduce(plan("table3", workdir, options), run_process=stand_in)
    printed = capsys.readouterr().out
    assert "full seed0: FAILED (error: " in printed
    assert "(steps differ)" in printed
    assert f"log: {log}" in printed


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("loading\nerror: no such file\n", "error: no such file"),
        ("Traceback\njax.SomeError: no memory\n", "jax.SomeError: no memory"),
        ("\rtraining: 3/9 [00:01, loss=2]  error: in use\n", "error: in use"),
        ("", ""),
    ],
)
def test_the_error_is_the_last_line_of_a_log(printed, error):
    assert last_error(printed) == error


def test_a_dry_run_shows_plan_and_cost_and_writes_nothing(finished, capsys):
    workdir = finished[0]
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    runs = plan("table3", workdir, TABLE3 | {"rows": ()}).runs()
    # Of each: 6 x (selection + two references) + 4 times 45 to select.
    changes = {"eval__references": True, "select_on": "base", "steps": 1000}
    changes |= {"eval__every": 300, "eval__base_episodes": 45}
    options = {"rows": ("full",), "seeds": (2, 3), "overrides": overrides(**changes)}
    runs += plan("table3", workdir, options).runs()
    print_plan(runs, lambda run: {STEP: 3.0, 1: 10.0})
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in s.split("|")[1:-1]] for s in lines[2:14]]
    rows = ("baseline", "fgpe", "fgpe_bgpe", *ROWS)
    for i, row in enumerate(cells[:10]):
        state = "done" if i >= 6 else "to do"
        assert row == [f"{rows[i // 2]} seed{i % 2}", "4", "6", state]
    assert cells[10:] == [[f"full seed{k}", "1,000", "198", "to do"] for k in (2, 3)]
    assert lines[14] == "full seed3: 3.00 s a step, 10.00 s an episode of 1 shot(s)"
    seconds = 6 * (4 * 3 + 6 * 10) + 2 * (1000 * 3 + 198 * 10)
    assert lines[16].startswith(f"12 runs, 8 to do: about {seconds / 3600:.1f} h")


def test_table1_over_two_folds_and_five_shots(tmp_path, capsys):
    workdir = tmp_path / "runs"
    reproduce(plan("table1", workdir, TABLE1), run_process=stand_in)
    assert "[2/2] tiny fold1 seed0: mIoU" in capsys.readouterr().out
    content = json.loads((workdir / "table1.json").read_text())
    for shots in (1, 5):
        row = content["sections"][str(shots)]["rows"]["tiny"]
        folders = [workdir / "tiny" / f"fold{fold}" / "seed0" for fold in (0, 1)]
        if shots == 5:
            folders = [next((folder / "5shot").iterdir()) for folder in folders]
        for fold, folder in enumerate(folders):
            protocol = json.loads((folder / "results.json").read_text())["protocol"]
            assert (protocol["shots"], protocol["fold"]) == (shots, fold)
        mious, fb_ious = zip(
            *(scored(folder).values() for folder in folders), strict=True
        )
        expected = dict(zip(("Fold-0", "Fold-1"), mious, strict=True))
        expected |= {"mIoU": statistics.mean(mious), "FB-IoU": statistics.mean(fb_ious)}
        assert list(row) == list(expected)
        for column, value in expected.items():
            np.testing.assert_allclose(row[column]["ours"], value, atol=0.006)
    page = (workdir / "table1.md").read_text()
    assert page.index("## 1-shot") < page.index("## 5-shot")
    assert "5-shot, 6 episodes" in page


def test_tables_1_and_2_plan_folds_backbones_and_weights(tmp_path, capsys):
    config, steps = tmp_path / "mine.py", 210_400  # it may lie anywhere
    shutil.copy(ROOT / "configs" / "coco_fold0.py", config)
    options = {"overrides": [f"--config.steps={steps}"]}
    runs = plan("table2", tmp_path / "nowhere", options, config).runs()
    print_plan(runs, lambda run: {STEP: 1.0, 1: 0.0, 5: 0.0})
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if "to do |" in line]
    backbones = ("resnet50", "resnet101")
    assert names == [f"{b} fold{f} seed0" for b in backbones for f in range(4)]
    # 4,000 episodes x 5 seeds x 2 numbers of shots; every 5,000 steps 1,000 to select
    assert "83,000" in lines[2]
    assert f"8 runs, 8 to do: about {8 * steps / 3600:.1f} h" in lines[-1]
    files = {Path(run.config.backbone.weights) for run in runs}
    assert {file.name for file in files} == {f"{b}.safetensors" for b in backbones}
    assert {file.parts[-3:-1] for file in files} == {("data", "weights")}
    start = [sys.executable, "-m", "qpenet_jax.cli", "train", "--config", str(config)]
    for run in runs:  # no train.py of a checkout: the installed package trains
        assert run.command(1)[:6] == start
        assert run.command(1)[-1] == "--config.seed=0"
        assert run.config.shots == 1


@pytest.mark.slow
def test_a_real_table_after_a_real_stop(tmp_path, capsys):
    """Stopped in the first step, then trained by the same command to its end."""
    run = tmp_path / "full" / "seed0"
    command = [*PROGRAM, *words("table3", tmp_path, ONE_RUN)]
    process = process_until_it_trains(command, run)
    process.terminate()  # which the command takes for Ctrl-C
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors.strip() == "stopped: the same command goes on"
    trainings = ["pgrep", "-f", f"train --config .* --workdir {run} "]
    assert subprocess.run(trainings).returncode == 1  # it has ended too
    assert "is saved: the same command goes on" in (run / "train.log").read_text()
    main(words("table3", tmp_path, ONE_RUN))
    assert "[1/1] full seed0: mIoU" in capsys.readouterr().out
    episodes = (run / "episodes_qpenet.csv").read_text()
    (run / "results.json").unlink()  # it is scored again, not trained
    main(words("table3", tmp_path, ONE_RUN))
    assert (run / "episodes_qpenet.csv").read_text() == episodes
    capsys.readouterr()
    section = json.loads((tmp_path / "table3.json").read_text())["sections"]["1"]
    miou = section["rows"]["full"]["mIoU"]["ours"]
    assert miou == scored(run)["mIoU"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main([*words("table3", tmp_path, ONE_RUN), "--dry-run"])
    printed = capsys.readouterr().out
    assert "full seed0: " in printed
    assert "s a step" in printed
    assert "1 runs, 0 to do: about 0.0 h" in printed


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [((), [100, 50, 150, 150]), (("--config.epochs=7",), [7, 7, 7, 7])],
)
def test_released_runs_have_the_authors_epochs(changes, epochs):
    config = ROOT / "configs" / "released_pascal.py"
    names = ("resnet50_deepstem", "resnet101_deepstem")
    runs = Plan("table1", config, "nowhere", (), changes, (), names, (2, 3)).runs()
    assert [run.config.epochs for run in runs] == epochs


def test_bad_calls_are_refused_in_one_line(tmp_path):
    def refused(table, words, config=CONFIG, **options):
        with pytest.raises(InputError, match=words):
            reproduce(plan(table, tmp_path / "runs", options, config))

    refused("table6", "choose table1, table2, table3, table4, table5")
    refused("table4", "row of table4: 'fgpe': choose pre, main", rows=("fgpe",))
    refused("table3", "fixed by the table", overrides=["--config.seed=4"])
    refused("table2", "give configs/coco_fold0.py")
    refused("table3", "no such config file", config="nope.py")
    assert not (tmp_path / "runs").exists()


def synthetic(gain=0.0, noise=0.0, version="v", seed=0):
    """60 episodes of 20 images and two classes: IoU 0.5 + gain + noise."""
    iou = 0.5 + gain + noise * np.random.default_rng(seed).normal(size=60)
    index = np.arange(60)
    scores = scores_of(np.round(1000 * iou), index % 20, index % 2 + 1)
    of = estimate(scores, [1, 2])
    means = {"mIoU": 100 * of.miou.value, "FB-IoU": 100 * of.fb_iou.value}
    return Found(scores, means, {"mIoU": [1, 2]}, {"version": version})


def test_seeds_of_the_same_images_are_no_new_evidence():
    """Twice the same scores: the interval shrinks only if the images are others."""
    one = synthetic(noise=0.1)
    alone = estimate(one.scores, [1, 2]).miou
    same = estimate(pooled([one, one]), [1, 2]).miou
    np.testing.assert_allclose(same, alone, rtol=1e-9)
    other = synthetic(noise=0.1, version="w")
    apart = estimate(pooled([one, other]), [1, 2]).miou
    np.testing.assert_allclose(apart.value, alone.value, rtol=1e-9)
    width = (apart.high - apart.low) / (alone.high - alone.low)
    np.testing.assert_allclose(width, 2**-0.5, rtol=0.1)


def test_orders_come_from_paired_differences():
    """Noise that both share cancels: 3 points show under noise of 20."""
    for gain, order in ((-0.03, "holds"), (0.03, "contrary"), (0.0, "undecided")):
        ours = [synthetic(gain, 0.2, seed=s) for s in (1, 2)]
        noise = [synthetic(0, 0.2, seed=s) for s in (1, 2)]
        difference = measured(ours, noise)["mIoU"]
        np.testing.assert_allclose(difference["ours"], 100 * gain, atol=0.01)
        np.testing.assert_allclose(difference["by_seed"], 100 * gain, atol=0.01)
        seeds = difference["by_seed"] if gain else [-1.0, 1.0]
        assert verdict(-1.0, difference["interval"], seeds) == order
    # The seeds have to agree, and the interval to leave 0 out.
    assert verdict(-1.0, (-2.0, -0.5), (-2.0, -0.5)) == "holds"
    assert verdict(-1.0, (-2.0, -0.5), (-4.0, 0.1)) == "undecided"
    assert verdict(1.0, (-2.0, 0.5), (-2.0, -0.5)) == "undecided"


def test_the_mean_over_folds_and_its_interval():
    def fold(ours, low, high, *by_seed):
        return {"ours": ours, "interval": [low, high], "by_seed": by_seed}

    mean = mean_over_folds([fold(50, 46, 56, 49, 51), fold(60, 57, 68, 60, 60)])
    assert mean["ours"] == 55
    # 55 - sqrt(16 + 9) / 2 and + sqrt(36 + 64) / 2
    assert mean["interval"] == [52.5, 60]
    assert mean["by_seed"] == [54.5, 55.5]
    assert mean["std"] == round(statistics.stdev((54.5, 55.5)), 2)


def test_the_papers_means_are_those_of_its_folds():
    for rows in FOLD_RESULTS.values():
        for values in rows.values():
            row = dict(zip(FOLD_COLUMNS, values, strict=True))
            mean = statistics.mean(row[f"Fold-{i}"] for i in range(4))
            assert abs(mean - row["mIoU"]) < 0.0751


def test_ticks_are_what_the_networks_have():
    has = {
        "FGPE": lambda net: net.fgpe,
        "BGPE": lambda net: net.bgpe,
        "FFA": lambda net: net.decoder == "ffa",
        "P_pre": lambda net: "pre" in net.prototypes,
        "P_main": lambda net: "main" in net.prototypes,
        "P_aux": lambda net: "aux" in net.prototypes,
        "activation maps": lambda net: net.activation_maps,
        "SGM": lambda net: net.sgm,
    }
    for rows in PAPER.values():
        parts = {part for *_, ticks in rows.values() for part in ticks}
        for name, (*_, ticks) in rows.items():
            net = QPENet(**VARIANTS[name].fields)
            assert set(ticks) == {part for part in parts if has[part](net)}
