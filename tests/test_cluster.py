"""Several processes that train and evaluate as one, as real processes on this machine.

The runs begin with a common start of one process and go on with one or with two
processes of two devices each, so that they can be compared with each other.
"""

import contextlib
import os
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
from commands import ROOT, assert_refused, passed, qpenet, tiny, tiny_config
from conftest import scalars, stopped_after

from qpenet_jax.core import cluster
from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import locked
from qpenet_jax.runs.checkpoints import open_checkpoints
from qpenet_jax.runs.folder import open_run
from qpenet_jax.training.batches import shardings
from qpenet_jax.training.train import LOCK_FILE, train

pytestmark = pytest.mark.standard_promotion

START, STEPS, SCORED = 3, 14, 7
"""Steps of the common start, of all, and between two evaluations for the selection."""

FIELDS = {
    "batch_size": 4,
    "steps": STEPS,
    "save_every": 3,
    "eval__every": SCORED,
    "eval__base_episodes": 120,
    "eval__references": False,
    "select_on": "base",
}

DEADLINE = 200
"""Seconds after which a test gives up."""


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


class Pair(contextlib.AbstractContextManager):
    """Two processes of two devices each that run one command; none is left behind."""

    def __init__(self, folder, *command, started=by_options):
        folder.mkdir(exist_ok=True)
        port = free_port()
        self.outputs = [folder / f"printed_{i}" for i in range(2)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            options, environment = started(i)
            if started is by_options:
                options = [f"--coordinator=127.0.0.1:{port}", *options]
            flags = os.environ.get("XLA_FLAGS", "")
            flags += " --xla_force_host_platform_device_count=2"
            environment |= {"JAX_COORDINATOR_PORT": str(port), "XLA_FLAGS": flags}
            run = [sys.executable, *command, *options]
            with output.open("w") as file:
                process = subprocess.Popen(
                    run,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                )
            self.processes.append(process)

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def printed(self):
        return [output.read_text() for output in self.outputs]

    def until(self, reached):
        """Wait until something is reached, while both are running."""
        deadline = time.monotonic() + DEADLINE
        while not reached():
            assert [p.poll() for p in self.processes] == [None, None], self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.01)

    def ended(self):
        """Return the exit codes."""
        return [process.wait(DEADLINE) for process in self.processes]

    def lines(self, i, *starts):
        """Return what a process printed of lines that start so."""
        text = self.outputs[i].read_text().replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith(starts)]


def training(workdir, **fields):
    """Return the words after `python` of a training."""
    return ["train.py", *tiny(workdir, **FIELDS | fields)[1:]]


def saved(workdir):
    """Return the steps that are saved."""
    found = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def assert_same_result(*runs):
    for name in ("episodes_qpenet.csv", "results.json", "scores.json"):
        texts = [(run / name).read_text() for run in runs]
        assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of one process that was stopped after START steps."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        stopped_after(START - 1),
        pytest.raises(KeyboardInterrupt),
    ):
        train(tiny_config(**FIELDS), workdir)
    return workdir


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """The run that one process went on with to its end."""
    workdir = shutil.copytree(start, tmp_path_factory.mktemp("one") / "run")
    passed(*tiny(workdir, **FIELDS))
    return workdir


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """The run that two processes went on with to its end, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    workdir = shutil.copytree(start, folder / "run")
    with Pair(folder, *training(workdir), started=by_open_mpi) as both:
        assert both.ended() == [0, 0], both.printed()
    return workdir, both


@pytest.mark.slow
def test_two_processes_train_and_score_as_one_does(one, two):
    workdir, both = two
    # Steps that a stopped process took again stand there twice.
    found, expected = (scalars(run, "train/loss") for run in (workdir, one))
    assert set(found) == set(expected) == set(range(1, STEPS + 1))
    steps = sorted(expected)
    np.testing.assert_allclose(
        [found[n] for n in steps], [expected[n] for n in steps], rtol=1e-6
    )
    assert_same_result(workdir, one)
    assert open_run(workdir).step == open_run(one).step  # selected once, for all
    # The first alone prints; of the other C++ may print how it is connected.
    assert both.lines(0, "# Results", "results, figure")
    assert not both.lines(1, "#", "|", "results", "training", "evaluating", "warning")
    files = [
        sorted(p.name for p in run.iterdir() if not p.name.startswith("events"))
        for run in (workdir, one)
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_one_of_two_is_stopped_or_killed_and_the_run_goes_on(start, one, two, tmp_path):
    copy = shutil.copytree(start, tmp_path / "run")
    with Pair(tmp_path / "stopped", *training(copy)) as both:
        both.until(lambda: SCORED in saved(copy))
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.ended() == [130, 130], both.printed()
        for i in range(2):
            assert "the same command goes on" in both.printed()[i]
    with open_checkpoints(copy, read_only=True) as checkpoints:
        assert SCORED not in checkpoints.scores

    alone = shutil.copytree(copy, tmp_path / "alone")
    passed(*tiny(alone, **FIELDS))
    assert_same_result(alone, one)

    with Pair(tmp_path / "killed", *training(copy), started=by_slurm) as both:
        both.until(lambda: saved(copy)[-1] > SCORED)
        both.processes[0].kill()
        killed = time.monotonic()
        codes = both.ended()
        assert codes[0] == -signal.SIGKILL
        assert codes[1] != 0, both.printed()
        assert time.monotonic() - killed < 60

    with Pair(tmp_path / "again", *training(copy)) as both:
        assert both.ended() == [0, 0], both.printed()
    params = [open_run(run).params for run in (copy, two[0])]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert_same_result(copy, two[0])


@pytest.mark.slow
def test_a_refusal_by_the_first_process_is_that_of_all(tmp_path):
    """Two devices of four have no part of this batch."""
    workdir = tmp_path / "run"
    with (
        locked(workdir / LOCK_FILE, "free before"),
        Pair(tmp_path, *training(workdir, batch_size=6)) as both,
    ):
        assert both.ended() == [2, 2], both.printed()
    for i in range(2):
        (line,) = both.lines(i, "error", "Traceback")
        assert "in use" in line
    (idle,) = both.lines(0, "warning")
    assert "batch_size=6 is shared by 2 of 4 devices" in idle
    assert "multiple of 4" in idle
    assert not both.lines(1, "warning")
    assert {path.name for path in workdir.iterdir()} == {LOCK_FILE}


@pytest.mark.slow
def test_a_finished_run_is_evaluated_by_two(two, tmp_path):
    arguments = ("evaluate", "--workdir", two[0], "--episodes", 5, "--seeds", "0,1")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    passed(*arguments, "--out", alone)
    # An evaluation is a command of the run's folder: its backbone has to be known.
    program = "import sys; sys.path.insert(0, 'tests'); import tiny"
    program += "; from qpenet_jax.cli.main import program; program(sys.argv[1:])"
    command = ["-c", program, *map(str, arguments), "--out", str(shared)]
    with Pair(tmp_path, *command) as both:
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
        shardings(5)
    refused = (
        r"batch_size=6 can't be shared 2 times by 2 processes: choose a multiple of 4"
    )
    with pytest.raises(InputError, match=refused):
        shardings(6, accumulate=2)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--coordinator=node1:99"], "belong together: give all three"),
        (["--processes=2", "--process=0"], "belong together: give all three"),
        (["--coordinator=node1", "--processes=2", "--process=0"], "a host and a port"),
        (["--coordinator=a:9", "--processes=2", "--process=2"], "from 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, refused):
    assert_refused(qpenet(*tiny(tmp_path / "run"), *options), refused)
    assert not (tmp_path / "run").exists()


def test_a_process_without_a_cluster_works_alone():
    cluster.join()
    assert (cluster.index(), cluster.count()) == (0, 1)
    assert cluster.gather(b"x") == [b"x"]
    assert not jax.distributed.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_cannot_be_read_is_warned_of():
    """In a process that hasn't used JAX yet, as a command's is."""
    code = "from qpenet_jax.core import cluster; cluster.join(); print(cluster.count())"
    broken = {"OMPI_MCA_orte_hnp_uri": "4096.0;nothing"}
    run = [sys.executable, "-c", code]
    ended = subprocess.run(
        run, cwd=ROOT, capture_output=True, text=True, env=os.environ | broken
    )
    assert ended.stdout == "1\n", ended.stderr
    assert "works alone" in ended.stderr
    assert "give --coordinator" in ended.stderr
