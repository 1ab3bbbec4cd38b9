"""Several processes that train and evaluate as one, as real processes on this machine.

The runs here begin with a common start of one process and go on with one or with two
processes of two devices each, so that most of them can be compared with each other.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import ROOT, assert_refused, qpenet, words

from qpenet_jax.core import cluster, last_words
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.runs import checkpoints, progress, sharding
from qpenet_jax.runs.folder import open_run
from qpenet_jax.training.train import LOCK_FILE

pytestmark = [
    pytest.mark.standard_promotion,
]

START, STEPS, SCORED = 3, 14, 7
"""Steps of the common start, of all, and between two evaluations for the selection."""

CHANGES = {
    "workers": 0,
    "batch_size": 4,
    "steps": STEPS,
    "save_every": 3,
    "eval__every": SCORED,
    "eval__base_episodes": 20,
    "eval__references": False,
    "select_on": "base",
}

DEADLINE = 300
"""Seconds after which a test gives up; nothing of what is tested depends on it."""


PROGRAM = """
import sys, types
from jax._src import compiler
state = types.SimpleNamespace(process_id=0, client=None)
compiler.distributed = types.SimpleNamespace(global_state=state)
from qpenet_jax.cli.main import program
program(sys.argv[1:])
"""
"""The command `qpenet`, whose compilations are kept in every process: JAX keeps those
of process 0 alone, and to compile is most of what these runs do."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_options(i):
    return ["--processes=2", f"--process={i}"], {}


def by_slurm(i):
    """What `srun --ntasks=2` sets, as far as JAX reads it."""
    names = {"JOB_ID": "1", "STEP_NODELIST": "127.0.0.1", "NTASKS": "2"}
    names |= {"PROCID": str(i), "LOCALID": str(i), "STEP_NUM_NODES": "1"}
    return [], {f"SLURM_{name}": value for name, value in names.items()}


def by_open_mpi(i):
    """What `mpirun -n 2` sets, as far as JAX reads it."""
    ours = {"SIZE": "2", "RANK": str(i), "LOCAL_RANK": str(i)}
    ranks = {f"OMPI_COMM_WORLD_{name}": value for name, value in ours.items()}
    return [], {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:9", **ranks}


class Pair:
    """Two processes of two devices each that run one command."""

    def __init__(self, folder, *command, started=by_options):
        port = free_port()
        self.outputs = [folder / f"printed_{i}" for i in range(2)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            options, environment = started(i)
            if started is by_options:
                options = [f"--coordinator=127.0.0.1:{port}", *options]
            environment |= {"JAX_COORDINATOR_PORT": str(port), "JAX_PLATFORMS": "cpu"}
            flags = os.environ.get("XLA_FLAGS", "")
            flags += " --xla_force_host_platform_device_count=2"
            run = [sys.executable, "-c", PROGRAM, *command, *options]
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        run,
                        cwd=ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | environment | {"XLA_FLAGS": flags},
                    )
                )

    def printed(self):
        return [output.read_text() for output in self.outputs]

    def until(self, reached):
        """Wait until something is reached, while both are running."""
        deadline = time.monotonic() + DEADLINE
        while not reached():
            assert [p.poll() for p in self.processes] == [None, None], self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.02)

    def ended(self):
        """Return the exit codes."""
        return [process.wait(DEADLINE) for process in self.processes]

    def lines(self, i, *starts):
        """Return what a process printed of lines that start so."""
        text = self.outputs[i].read_text().replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith(starts)]


@contextlib.contextmanager
def pair(folder, *command, **options):
    """Run a pair, and leave none of it behind."""
    folder.mkdir(exist_ok=True)
    both = Pair(folder, *command, **options)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()


def training(workdir, **changes):
    return ["train", *words(workdir, **CHANGES | changes)]


def train_alone(workdir):
    """Train in this process, whose other tests are stricter with types."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return qpenet(*training(workdir))


def saved(workdir):
    """Return the steps that are saved."""
    found = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def losses(workdir):
    events = EventAccumulator(str(workdir))
    events.Reload()
    # Steps that a stopped process took again stand there twice.
    return {e.step: e.value for e in events.Scalars("train/loss")}


def assert_same_run(ours, theirs):
    """Compare the losses of all steps and the result."""
    found, expected = losses(ours), losses(theirs)
    assert set(found) == set(expected) == set(range(1, STEPS + 1))
    steps = sorted(expected)
    np.testing.assert_allclose(
        [found[n] for n in steps], [expected[n] for n in steps], rtol=1e-6
    )
    assert_same_result(ours, theirs)


def assert_same_result(ours, theirs):
    rows = [(run / "episodes_qpenet.csv").read_text() for run in (ours, theirs)]
    assert rows[0] == rows[1]
    found = [json.loads((run / "results.json").read_text()) for run in (ours, theirs)]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of one process that was stopped after START steps."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    add, steps = progress.Progress.add, []

    def stopped(self, measured):
        steps.append(measured)
        if len(steps) == START:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "add", stopped)
        result = train_alone(workdir)
    assert result.returncode == 130, result.stderr
    assert saved(workdir)[-1] == START
    return workdir


@pytest.fixture
def copy(start, tmp_path):
    return shutil.copytree(start, tmp_path / "run")


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """The run that one process went on with to its end."""
    workdir = shutil.copytree(start, tmp_path_factory.mktemp("one") / "run")
    result = train_alone(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """The run that two processes went on with to its end, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    workdir = shutil.copytree(start, folder / "run")
    with pair(folder, *training(workdir), started=by_open_mpi) as both:
        assert both.ended() == [0, 0], both.printed()
    return workdir, both


def test_two_processes_train_and_score_as_one_does(one, two):
    workdir, both = two
    assert_same_run(workdir, one)
    assert open_run(workdir).step == open_run(one).step  # selected once, for all
    # The first alone prints; of the other C++ may tell how it is connected.
    assert both.lines(0, "# Results", "results, figure")
    assert not both.lines(1, "#", "|", "results", "training", "evaluating", "warning")
    files = [
        sorted(p.name for p in run.iterdir() if not p.name.startswith("events"))
        for run in (workdir, one)
    ]
    assert files[0] == files[1]


def test_one_of_two_is_stopped_or_killed_and_the_run_goes_on(one, two, copy, tmp_path):
    def selecting():
        return "evaluating selection" in both.printed()[0]

    with pair(tmp_path / "stopped", *training(copy)) as both:
        both.until(selecting)
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.ended() == [130, 130], both.printed()
        for i in range(2):
            (told,) = both.lines(i, "step", "stopped", "error")
            assert told == f"step {SCORED} is saved: the same command goes on"
    assert SCORED in saved(copy)
    with checkpoints.open_checkpoints(copy, read_only=True) as manager:
        assert not checkpoints.is_scored(manager, SCORED)

    alone = shutil.copytree(copy, tmp_path / "alone")
    result = train_alone(alone)
    assert result.returncode == 0, result.stderr
    assert_same_run(alone, one)

    with pair(tmp_path / "killed", *training(copy)) as both:
        both.until(lambda: saved(copy)[-1] > SCORED)
        both.processes[0].kill()
        codes = both.ended()
        assert codes == [-signal.SIGKILL, last_words.GONE], both.printed()
        (told,) = both.lines(1, "step", "stopped", "error", "Traceback", "F1", "E1")
        assert "is gone" in told
        assert "goes on from the last checkpoint" in told

    with pair(tmp_path / "again", *training(copy)) as both:
        assert both.ended() == [0, 0], both.printed()
    ours, theirs = open_run(copy).params, open_run(two[0]).params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert_same_result(copy, two[0])


def test_a_refusal_by_the_first_process_is_told_by_all(tmp_path):
    """Under SLURM's variables; two devices of four have no part of this batch."""
    workdir = tmp_path / "run"
    with locked(workdir / LOCK_FILE, "free before"):
        command = training(workdir, batch_size=6)
        with pair(tmp_path, *command, started=by_slurm) as both:
            assert both.ended() == [2, 2], both.printed()
    for i in range(2):
        (told,) = both.lines(i, "error", "Traceback")
        assert "in use" in told
    (idle,) = both.lines(0, "warning")
    assert "batch_size=6 is shared by 2 of 4 devices" in idle
    assert "multiple of 4" in idle
    assert not both.lines(1, "warning")
    assert {path.name for path in workdir.iterdir()} == {LOCK_FILE}


def test_a_finished_run_is_evaluated_by_two(two, tmp_path):
    shots = ("evaluate", "--workdir", two[0], "--episodes", "5", "--seeds", "0,1")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    result = qpenet(*shots, "--out", alone)
    assert result.returncode == 0, result.stderr
    with pair(tmp_path, *map(str, shots), "--out", str(shared)) as both:
        assert both.ended() == [0, 0], both.printed()
    (ours,), (theirs,) = (f.glob("*/episodes_qpenet.csv") for f in (shared, alone))
    assert ours.read_text() == theirs.read_text()
    assert both.lines(0, "written to")
    assert not both.lines(1, "written to", "protocol")


def devices(*processes):
    return [types.SimpleNamespace(process_index=p) for p in processes]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: devices(0, 0, 1, 1))
    with pytest.raises(InputError, match=r"batch_size=5 .* 2 processes: choose a mult"):
        sharding.shardings(5)
    told = (
        r"batch_size=6 can't be shared 2 times by 2 processes: choose a multiple of 4"
    )
    with pytest.raises(InputError, match=told):
        sharding.shardings(6, accumulate=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--coordinator=node1:99"], "belong together: give all three"),
        (["--processes=2", "--process=0"], "belong together: give all three"),
        (["--coordinator=node1", "--processes=2", "--process=0"], "a host and a port"),
        (["--coordinator=a:9", "--processes=2", "--process=2"], "from 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, told):
    refused = qpenet(*training(tmp_path / "run"), *options)
    assert_refused(refused, told)
    assert not (tmp_path / "run").exists()


def test_a_single_task_of_a_cluster_works_alone(monkeypatch):
    for name, value in (by_slurm(0)[1] | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    cluster.join()
    assert (cluster.index(), cluster.count()) == (0, 1)
    assert cluster.gather(b"x", "topic") == [b"x"]
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_cannot_be_read_is_told(monkeypatch, capsys):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "4096.0;nothing")
    cluster.join()
    assert cluster.count() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "works alone" in line
    assert "give --coordinator" in line


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("heartbeats):\n/job:jax_worker/replica:0/task:1\n", "process 1"),
        ("heartbeats):\n1\nThe tasks have crashed", "process 1"),
        ("Socket closed", "another process"),
    ],
)
def test_who_is_gone_is_told_as_far_as_it_is_known(text, who, capsys):
    watch = types.SimpleNamespace(_spread=False)
    assert last_words.Watch._tell(watch, text) == last_words.GONE  # type: ignore
    assert f"error: {who} is gone" in capsys.readouterr().err


def test_a_process_that_ends_for_a_reason_of_its_own_keeps_its_status(monkeypatch):
    """The others end faster than this one: it isn't to be told that they are gone."""
    done = []
    watch = types.SimpleNamespace(
        settle=lambda status: done.append(f"ends with {status}")
    )
    monkeypatch.setattr(cluster, "_watch", watch)
    monkeypatch.setattr(cluster, "_let_others_end", lambda: done.append("others told"))
    monkeypatch.setattr(os, "_exit", done.append)
    cluster.leave(2)
    assert done == ["ends with 2", "others told", 2]


ABORTED = """
import ctypes
from qpenet_jax.core import cluster, last_words

c = ctypes.CDLL(None)

def aborted():
    c.perror(last_words.FATAL.encode())
    c.abort()

cluster._let_others_end = aborted
cluster._watch = last_words.Watch(lambda: False)
cluster._watch.start()
cluster.leave(last_words.GONE)
"""
"""A process that JAX aborts while it waits for the others to end."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's abort can wait")
def test_an_abort_while_others_are_told_keeps_the_status():
    run = [sys.executable, "-c", ABORTED]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (last_words.GONE, "")
