"""What a protocol says of itself, and the presets."""

import dataclasses
import json

import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.data.versions import dataset_version
from qpenet_jax.evaluation.protocols import (
    PRESETS,
    Protocol,
    of_dataset,
    preset_fields,
)


def made(preset="default", split="pascal", **changes):
    facts = {"dataset": "toy", "split": split, "fold": 1, "classes": ("one", "two")}
    return Protocol(
        **facts | preset_fields(preset, split) | {"preset": preset} | changes
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("split", ["pascal", "coco_fwb", "coco_panet"])
def test_a_preset_goes_by_its_name_until_a_field_is_changed(preset, split):
    assert made(preset, split).name == preset
    assert str(made(preset, split)).startswith(f"{preset}: toy")
    changed = made(preset, split, episodes=7, seeds=(8, 9))
    assert changed.name == f"{preset}, but episodes=7 seeds=8,9"


def test_names_hold_all_seeds_and_the_start_of_a_hash():
    ten = made(seeds=tuple(range(10)))
    assert ten.name == "default, but seeds=0,1,2,3,4,5,6,7,8,9"
    assert "x seeds 0,1,2,3,4,5,6,7,8,9," in str(ten)
    assert made(episode_list="ab" * 32).name == "default, but episode_list=abababababab"


def test_facts_of_the_published_evaluations():
    def facts(preset, split):
        fields = preset_fields(preset, split)
        names = ("episodes", "seeds", "order", "targets", "scoring", "exclude_novel")
        return tuple(fields[name] for name in names)

    five = (0, 1, 2, 3, 4)
    shuffled, listed = ("shuffled", "large"), ("list", "any")
    assert facts("paper", "pascal") == (1000, five, *shuffled, "original", True)
    assert facts("paper", "coco_fwb")[0] == 4000
    for split in ("pascal", "coco_fwb"):
        assert facts("released", split) == (1000, five, *listed, "input", True)
        assert facts("bam", split) == (1000, five, *listed, "original", True)
    assert facts("pfenet", "pascal") == (5000, (0,), *listed, "original", False)
    assert facts("pfenet", "coco_fwb")[0] == 20000
    assert facts("hsnet", "pascal") == (1000, (0,), "pairs", "large", "input", False)
    assert facts("hsnet", "coco_fwb")[2] == "classes"
    hsnet = preset_fields("hsnet", "pascal")
    assert (hsnet["resize"], hsnet["side"]) == ("squash", 401)


def test_every_field_is_shown():
    """Any change shows in the dictionary, and what a reader compares in the line."""
    one = made()
    changes = {
        "dataset": "other", "split": "blocks", "fold": 2, "version": "ab12",
        "release": "x/1.0.0",
        "shots": 5, "episodes": 9, "seeds": (3,), "order": "list", "targets": "any",
        "min_pixels": 1, "side": 33, "resize": "squash", "scoring": "exact",
        "exclude_novel": False, "episode_list": "0123456789ab", "preset": "bam",
    }  # fmt: skip
    for name, value in changes.items():
        other = dataclasses.replace(one, **{name: value})
        assert str(other) != str(one), name
        assert other.to_dict()[name] == json.loads(json.dumps(value))
    assert preset_fields("default", "pascal").keys() <= changes.keys()
    assert one.to_dict()["text"] == str(one)
    assert one.to_dict()["ignore"] == 255


@pytest.mark.parametrize(
    "wrong",
    [
        *[{name: "x"} for name in ("scoring", "order", "targets", "resize")],
        *[{"seeds": seeds} for seeds in ((), (-1,), (1, 1))],
        *[{"side": side} for side in (100, 9)],
        {"episodes": 0},
    ],
)
def test_senseless_values_are_refused(wrong):
    with pytest.raises(InputError):
        made(**wrong)
    with pytest.raises(InputError, match="choose default, paper"):
        preset_fields("x", "pascal")


def test_the_version_names_images_and_pixels():
    one, other = Shapes("val", 5, 65), Shapes("val", 5, 65, seed=1)
    assert dataset_version(one) == dataset_version(Shapes("val", 5, 65))
    assert dataset_version(one) != dataset_version(other)
    assert len(dataset_version(one)) == 12

    class Prepared(Shapes):
        version = "toy/main/1.0.0"

    found = of_dataset(made(), Prepared("val", 5, 65))
    assert (found.release, found.version) == ("toy/main/1.0.0", dataset_version(one))
    assert f"toy (toy/main/1.0.0 {dataset_version(one)})" in str(found)
    assert of_dataset(made(), one).release == ""
