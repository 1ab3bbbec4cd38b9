"""Config files: where they may lie, and what is said of their errors."""

import contextlib
import os

import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.runs.build import complete
from qpenet_jax.runs.config_files import load_config

GOOD = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({"seed": 0, "optimizer": {"lr": 0.1, "clip": 0.0}})
    config.dataset = ConfigDict({"root": "data"})
    return config
"""


def written(folder, text, name="my.py"):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text)
    return file


def refused(file, *overrides):
    with pytest.raises(InputError) as refusal:
        load_config(file, overrides)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_fields_are_changed_in_all_spellings(tmp_path):
    file = written(tmp_path, GOOD)
    config = load_config(file, ["--config.optimizer.lr=1", "--config.seed", "3"])
    assert config.optimizer.lr == 1.0
    assert config.seed == 3
    assert config.is_locked
    assert load_config(file).seed == 0


def test_an_edit_within_the_same_second_is_seen(tmp_path):
    """Nor does Python's bytecode appear beside the file."""
    file = written(tmp_path, GOOD)
    assert load_config(file).optimizer.lr == 0.1
    times = file.stat()
    file.write_text(GOOD.replace("0.1", "0.2"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_config(file).optimizer.lr == 0.2
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optimizer.lrr=1", ["optimizer.lrr", "did you mean optimizer.lr"]),
        ("--config.lr=1", ["no such config field: lr", "did you mean optimizer.lr?"]),
        ("--config.zzz=1", ["no such config field: zzz; qpenet_jax/config.py"]),
        ("--config.seed=a", ["config.seed=a"]),
        ("--config.seed", ["config.seed"]),
        ("nonsense", ["unknown argument 'nonsense'"]),
    ],
)
def test_bad_overrides_are_one_line(tmp_path, override, words):
    message = refused(written(tmp_path, GOOD), override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("import math\n\nmath.nothing\n", "line 3", ["AttributeError", "nothing"]),
        ("def get_config():\n    return {}['a']\n", "line 2", ["KeyError: 'a'"]),
        ("def get_config(:\n", "line 1", ["SyntaxError"]),
        ("a = 1\0", "line 1", ["SyntaxError", "null"]),
        ("from nowhere import x\n", "line 1", ["ModuleNotFoundError", "nowhere"]),
        (GOOD.replace("config.dataset =", "config.a.b ="), "line 6", ["'a'"]),
        ("x = 1\n", "", ["get_config"]),
        ("def get_config():\n    return 3\n", "", ["ConfigDict"]),
    ],
)
def test_an_error_inside_a_config_is_named_with_its_line(tmp_path, text, place, words):
    file = written(tmp_path, text)
    message = refused(file)
    assert message.startswith(f"{file}, {place}: " if place else f"{file}: ")
    for word in words:
        assert word in message
    assert "no such config field" not in message


def test_an_error_in_a_module_beside_it_is_named_there(tmp_path):
    helper = written(tmp_path, "def value():\n    return 1 / 0\n", "beside.py")
    text = "import beside\n\ndef get_config():\n    return beside.value()\n"
    message = refused(written(tmp_path, text))
    assert message.startswith(f"{helper}, line 2: ZeroDivisionError")


def test_each_checkout_has_its_own_configs(tmp_path):
    """`from configs import common` is of the folder that holds that configs/."""
    text = "from configs import common\n\ndef get_config():\n    return common.make()\n"
    made = "from ml_collections import ConfigDict\n\n"
    made += "def make():\n    return ConfigDict({'seed': NUMBER})\n"
    for number in (1, 2):
        folder = tmp_path / str(number) / "configs"
        written(folder, made.replace("NUMBER", str(number)), "common.py")
        assert load_config(written(folder, text)).seed == number


def test_a_config_elsewhere_finds_the_configs_of_the_current_folder(tmp_path):
    here = tmp_path / "here"
    written(here / "configs", GOOD, "common.py")
    text = "from configs import common\n\nget_config = common.get_config\n"
    file = written(tmp_path / "elsewhere" / "deep", text)
    with contextlib.chdir(here):
        assert load_config(os.path.relpath(file)).seed == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.model.channles = 8", "model.channles: did you mean model.channels"),
        ("config.sead = 3", "no such config field: sead: did you mean seed"),
        ("config.model.head_dropout = None", "config.model.head_dropout has no value"),
        ("del config.epochs", "config.epochs has no value; start from"),
        ("config.loss.alpha = float('nan')", "config.loss.alpha=nan: give finite"),
        ("config.augmentation.scale = (1.0, 1e999)", "augmentation.scale=.*finite"),
    ],
)
def test_fields_that_no_run_could_use_are_refused(tmp_path, line, words):
    text = "from qpenet_jax.config import default_config\n\ndef get_config():\n"
    text += f"    config = default_config()\n    {line}\n    return config\n"
    with pytest.raises(InputError, match=words):
        complete(load_config(written(tmp_path, text)))
