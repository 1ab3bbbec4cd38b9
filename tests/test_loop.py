"""When training is stopped, and who may train in a workdir (see also test_train.py)."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import types
from typing import Any

import jax
import numpy as np
import pytest
from test_train import ROOT, SHRUNK, assert_refused, qpenet, train

from qpenet_jax.config import SELECTION
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.runs import checkpoints, loop, progress
from qpenet_jax.runs.build import FREE
from qpenet_jax.runs.config_files import load_config
from qpenet_jax.runs.evaluator import Evaluator
from qpenet_jax.runs.folder import open_run
from qpenet_jax.training.profiling import Profile
from qpenet_jax.training.stopping import Interrupted, StopSignal

pytestmark = [
    pytest.mark.standard_promotion,
]

SCORES = {1: 30.0, 2: 90.0, 3: 10.0}
"""What the selection is told of each step: the second is the best."""


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def config(**changes):
    fields = {"select_on": "base", "eval.every": 1, "eval.references": False}
    fields |= {"steps": 3, "workers": 0} | changes
    words = [f"--config.{name}={v}" for name, v in (SHRUNK | fields).items()]
    return load_config(ROOT / "configs" / "quickstart.py", words)


@pytest.fixture
def scored(monkeypatch):
    """Let checkpoints be scored by SCORES; the fixture is the list of scored steps."""
    seen = []

    def miou(self, params):
        seen.append(len(seen) + 1)
        return SCORES[seen[-1]]

    monkeypatch.setattr(Evaluator, "miou", miou)
    return seen


def scores(workdir):
    with checkpoints.open_checkpoints(workdir, read_only=True) as manager:
        return {step: manager.metrics(step) for step in manager.all_steps()}


def test_a_stop_while_a_checkpoint_is_scored_saves_it_and_the_resume_scores_it(
    scored, tmp_path, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(config(), whole)
    assert scored == [1, 2, 3]
    assert scores(whole) == {2: {"base": 90.0}, 3: {"base": 10.0}}

    scored.clear()
    score = Evaluator.miou

    def killed(self, params):
        if len(scored) == 1:
            stop()
        return score(self, params)

    monkeypatch.setattr(Evaluator, "miou", killed)
    with pytest.raises(Interrupted, match="step 2 is saved: the same command goes on"):
        loop.train(config(), stopped)
    assert scored == [1], "the stop didn't wait for the score"
    assert scores(stopped)[2] is None

    monkeypatch.setattr(Evaluator, "miou", score)
    loop.train(config(), stopped)
    assert scored == [1, 2, 3], "the step that was left unscored comes first"
    assert scores(stopped) == scores(whole)
    ours, theirs = open_run(stopped), open_run(whole)
    assert ours.step == theirs.step == 2
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    name = "episodes_qpenet.csv"
    assert (stopped / name).read_text() == (whole / name).read_text()


def test_a_stop_in_the_last_step_is_acted_on_as_well(scored, tmp_path, monkeypatch):
    tell = loop.Progress.tell

    def killed(self, step, saved):
        if step == 3:
            stop()
        tell(self, step, saved)

    monkeypatch.setattr(loop.Progress, "tell", killed)
    with pytest.raises(Interrupted, match="step 3 is saved"):
        loop.train(config(), tmp_path)
    assert scored == [1, 2]
    assert not (tmp_path / "results.json").exists()
    loop.train(config(), tmp_path)
    assert scored == [1, 2, 3]
    assert open_run(tmp_path).step == 2
    assert (tmp_path / "results.json").exists()


def test_one_training_is_scored_by_every_selection(tmp_path, monkeypatch, capsys):
    """Base classes like the first step, novel ones the second; the third is last."""
    likes = {"base": iter([90.0, 50.0, 10.0]), "novel": iter([50.0, 90.0, 10.0])}

    def miou(self, params):
        return next(likes["base" if self.protocol.preset == "ours" else "novel"])

    monkeypatch.setattr(Evaluator, "miou", miou)
    changed = config(**{"select_on": "base,novel,last", "eval.protocol": "pfenet"})
    loop.train(changed, tmp_path)
    told = [
        line.split("|")[1:3]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| base", "| novel", "| last"))
    ]
    words = [[word.strip() for word in line] for line in told]
    assert words == [["base", "1"], ["novel", "2"], ["last", "3"]]
    assert open_run(tmp_path).step == 1
    for name, step in (("novel", 2), ("last", 3)):
        assert open_run(tmp_path, selection=name).step == step
        results = json.loads(
            (tmp_path / f"selected_on_{name}" / "results.json").read_text()
        )
        assert results["step"] == step
        assert results["selection"] == SELECTION[name]
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["step"], result["selection"]) == (1, SELECTION["base"])


def test_a_selection_that_was_not_made_is_refused(scored, tmp_path):
    loop.train(config(), tmp_path)
    assert open_run(tmp_path, selection="last").step == 3
    with pytest.raises(InputError, match="no checkpoint by 'novel': choose base, last"):
        open_run(tmp_path, selection="novel")


@pytest.mark.parametrize("method", ["references", "__call__"])
def test_a_stop_outside_of_the_steps_is_acted_on_at_once(
    scored, tmp_path, monkeypatch, method
):
    def killed(self, *_, **__):
        stop()
        raise AssertionError("went on after the stop")

    monkeypatch.setattr(Evaluator, method, killed)
    changes = {"eval.references": method == "references"}
    with pytest.raises(Interrupted, match="stopped: the same command goes on"):
        loop.train(config(**changes), tmp_path)
    assert sorted(scores(tmp_path)) == ([] if method == "references" else [2, 3])


def test_a_signal_is_noted_while_postponed_and_raised_after_it(capsys):
    reached = []

    def step():
        with signals.postponed():
            stop()
            assert signals.asked
            reached.append("the rest of the step")
            with pytest.raises(Interrupted), signals.at_once():
                reached.append("too late")
            os.kill(os.getpid(), signal.SIGINT)  # another kind is no second one
            reached.append("the save")

    with pytest.raises(Interrupted), StopSignal() as signals:
        step()
    assert reached == ["the rest of the step", "the save"]
    assert "after this step" in capsys.readouterr().err


def test_a_second_signal_stops_in_the_middle():
    def step():
        with signals.postponed():
            stop()
            stop()
            raise AssertionError("went on after the second signal")

    with pytest.raises(KeyboardInterrupt), StopSignal() as signals:
        step()


def test_a_signal_that_something_swallowed_is_told_in_the_end():
    """As where Python runs a destructor, which has nobody to raise to."""

    def work():
        with contextlib.suppress(Interrupted):
            stop()

    with pytest.raises(Interrupted, match="when all was done"), StopSignal():
        work()


class StopsWhenCleanedUp:
    """Gets a signal where Python drops what is raised."""

    def __init__(self, reached):
        self.reached = reached

    def __del__(self):
        with contextlib.suppress(ZeroDivisionError):
            stop()
            self.reached.append("the rest of the destructor")


def test_a_stop_that_python_drops_is_raised_again():
    """Else other processes, which have heard of it, would wait for this one forever."""
    hook, reached = sys.unraisablehook, []

    def score():
        lost = StopsWhenCleanedUp(reached)
        del lost
        reached.append("the next line")
        time.sleep(30)
        reached.append("the end")

    def step():
        with signals.postponed():
            with contextlib.suppress(Interrupted), signals.at_once():
                score()
            reached.append("the save")

    with pytest.raises(Interrupted, match="goes on"), StopSignal() as signals:
        step()
    assert reached == ["the next line", "the save"]
    assert sys.unraisablehook == hook


def test_the_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@dataclasses.dataclass
class Listed:
    """What a trainer and an evaluator tell of their images."""

    dataset: VOCLayout
    images: np.ndarray

    sampler = property(lambda self: self)
    samplers = property(lambda self: [self])
    val = property(lambda self: self.dataset)

    def __len__(self):
        return len(self.images)


def test_scored_images_that_are_trained_on_are_told(tmp_path, write_voc, capsys):
    """One list may serve both, as long as each has images of its own."""
    root = write_voc(tmp_path, images=6, classes=3)
    data = VOCLayout(root, root / "ids.txt", ("one", "two", "three"))
    trainer, apart, shared = (
        Listed(data, np.array(x)) for x in ((0, 1, 3), (2, 4, 5), (3, 1))
    )
    assert loop._trained_on(trainer, "what", apart) == {}
    assert capsys.readouterr().err == ""
    found = loop._trained_on(trainer, "what", shared)
    assert found == {"what": "2 of 2, such as im_003 = im_003"}
    assert capsys.readouterr().err == "warning: what: 2 of 2, such as im_003 = im_003\n"


def test_a_second_training_in_a_workdir_is_refused(tmp_path):
    workdir = tmp_path / "run"
    with locked(workdir / loop.LOCK_FILE, "free before"):
        refused = train(workdir, eval__references=False)
        assert_refused(refused, str(workdir), "in use", "--workdir")
        assert [path.name for path in workdir.iterdir()] == [loop.LOCK_FILE]


# --- A loss that isn't finite ---


@pytest.fixture
def taken(monkeypatch):
    """The first batch of each start; the third step of all has no finite loss."""
    starts, steps = [], []
    batches, step = loop.Trainer.batches, loop.Trainer.step

    def started(self, start_step=0):
        starts.append(start_step)
        return batches(self, start_step)

    def diverging(self, state, batch):
        steps.append(len(steps) + 1)
        state, measured = step(self, state, batch)
        if steps[-1] == 4:
            stop()
        return state, measured | ({"loss": np.nan} if steps[-1] == 3 else {})

    monkeypatch.setattr(loop.Trainer, "batches", started)
    monkeypatch.setattr(loop.Trainer, "step", diverging)
    return starts


def test_a_retry_takes_other_episodes_also_when_it_is_resumed(
    scored, taken, tmp_path, capsys
):
    """Batch 2 (from 0) led to the NaN of step 3: it's left out from then on."""
    asked = config(retries_on_nan=1, steps=4, **{"eval.every": 2})
    with pytest.raises(Interrupted, match="step 3 is saved"):
        loop.train(asked, tmp_path)
    assert taken == [0, 3]
    told = "warning: loss is nan at step 3: back to step 2, and on with other episodes"
    assert told in capsys.readouterr().err
    loop.train(asked, tmp_path)
    assert taken == [0, 3, 4]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["retries"] == [{"at": 3, "found": "loss is nan", "to": 2}]
    assert "went back to step 2" in (tmp_path / "results.md").read_text()


def test_without_being_asked_it_stops_at_the_first_bad_step(taken, tmp_path):
    """And may be asked then, in the same folder: the results tell its use."""
    few = {"steps": 4, "log_every": 4, "save_every": 2, "select_on": "last"}
    few["eval.every"] = 4
    with pytest.raises(InputError, match=r"nan at step 3; .* step 2 is kept"):
        loop.train(config(**few), tmp_path)
    assert not (tmp_path / "retries.json").exists()
    assert sorted(scores(tmp_path)) == [2]
    assert "retries_on_nan" in FREE


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    step = loop.Trainer.step

    def overflowing(self, state, batch):
        state, measured = step(self, state, batch)
        if int(state.step) == 2:
            params = jax.tree.map(lambda leaf: leaf * np.inf, state.params)
            state = dataclasses.replace(state, params=params)
        return state, measured

    monkeypatch.setattr(loop.Trainer, "step", overflowing)
    with pytest.raises(InputError, match=r"parameter isn't finite at step 2; .*step 1"):
        loop.train(config(select_on="last"), tmp_path)
    assert sorted(scores(tmp_path)) == [1]


# --- What is told of the speed ---


class Time:
    """Stands for the module `time`: it passes as it is told."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Written(dict):
    """Stands for the file of TensorBoard's events."""

    def __call__(self, folder, **options):
        return self

    def __exit__(self, *error):
        pass

    def add_scalar(self, name, value, step):
        self[name, step] = value


def test_speed_and_waiting_are_of_the_steps_since_the_last_time(tmp_path, monkeypatch):
    clock, written = Time(), Written()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "Events", written)
    settings = types.SimpleNamespace(batch_size=3, shots=2)
    trainer: Any = types.SimpleNamespace(
        config=settings, steps=9, learning_rate=lambda t: 0.5**t
    )

    def steps(told, waited, passed):
        for _ in range(4):
            with told.waiting():
                clock.now += waited
            clock.now += passed
            told.add({"loss": 1.0, "iou": 0.5, "grad_norm": 1.0})

    with progress.Progress(trainer, tmp_path, start=0) as told:
        steps(told, waited=0.0, passed=0.5)
        told.tell(4, saved=None)
        clock.now += 99  # an evaluation
        told.restart_clock()
        steps(told, waited=1.5, passed=0.5)
        told.tell(8, saved=None)
    names = ("learning_rate", "images_per_second", "step_seconds", "waiting_for_data")
    found = {step: [written[f"train/{n}", step] for n in names] for step in (4, 8)}
    assert found == {4: [1 / 8, 18, 0.5, 0], 8: [1 / 128, 4.5, 2, 0.75]}


@pytest.mark.parametrize(
    ("steps", "start", "total", "expected"),
    [
        (5, 0, 100, range(11, 16)),
        (5, 40, 100, range(51, 56)),
        (5, 0, 12, range(8, 13)),
        (5, 0, 3, range(1, 4)),
        (0, 0, 100, range(11, 11)),
    ],
)
def test_which_steps_are_traced(steps, start, total, expected, tmp_path):
    assert Profile(tmp_path, steps, start, total).steps == expected


def traces(workdir):
    return list(workdir.glob("plugins/profile/*/*.xplane.pb"))


# ProfileData has types without a module; as an error, the warning ends the process.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_trace_has_the_steps_that_were_asked_for(scored, tmp_path):
    loop.train(config(), tmp_path, profile=2)
    (trace,) = traces(tmp_path)
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [e for plane in data.planes for line in plane.lines for e in line.events]
    named = [dict(event.stats) for event in events if event.name == "train"]
    assert sorted(stats["step_num"] for stats in named) == [2, 3]
    assert (tmp_path / "results.json").exists()


def test_a_stop_ends_a_trace(scored, tmp_path, monkeypatch):
    add = progress.Progress.add

    def killed(self, measured):
        stop()
        add(self, measured)

    monkeypatch.setattr(progress.Progress, "add", killed)
    with pytest.raises(Interrupted, match="step 1 is saved"):
        loop.train(config(), tmp_path, profile=3)
    assert len(traces(tmp_path)) == 1
    jax.profiler.start_trace(tmp_path / "another")  # else it would be refused
    jax.profiler.stop_trace()


@pytest.mark.parametrize("extra", [["--profile", "-1"], ["--profile", "2", "--check"]])
def test_a_trace_of_nothing_is_refused(extra):
    refused = qpenet("train", "--config", "configs/quickstart.py", *extra)
    assert_refused(refused, "--profile", "1 or more")
