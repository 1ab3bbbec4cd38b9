"""Frozen episodes: written, read back, and refused where they don't fit."""

import csv
import hashlib

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.episode_lists import export_episodes, read_episodes
from qpenet_jax.data.episodes import EpisodeSampler
from qpenet_jax.data.sources.shapes import Shapes


@pytest.fixture(scope="module")
def dataset():
    return Shapes("val", 80, 65)


@pytest.fixture(scope="module")
def samplers(dataset):
    return [
        EpisodeSampler(dataset.counts, (1, 2, 3), 2, seed, min_pixels=1)
        for seed in (4, 9)
    ]


@pytest.fixture
def listed(tmp_path, dataset, samplers):
    path = tmp_path / "deep" / "episodes.csv"
    export_episodes(path, dataset, samplers, 7)
    return path


def test_read_back_exactly(listed, dataset, samplers):
    frozen = read_episodes(listed, dataset)
    for ours, theirs in zip(frozen.samplers, samplers, strict=True):
        assert ours.seed == theirs.seed
        assert [ours(i) for i in range(7)] == [theirs(i) for i in range(7)]
        shown = {theirs(i).class_id for i in range(7)}
        assert ours.shown == tuple(sorted(shown))
    fields = frozen.fields
    assert (fields["shots"], fields["episodes"], fields["seeds"]) == (2, 7, (4, 9))
    assert fields["episode_list"] == frozen.sha256


def test_any_program_can_read_and_check_it(listed, dataset, samplers):
    """By the description in data/README.md alone."""
    first, rest = listed.read_bytes().split(b"\n", 1)
    assert first == b"# sha256 " + hashlib.sha256(rest).hexdigest().encode()
    rows = list(csv.DictReader(rest.decode().splitlines()))
    assert len(rows) == 14
    ids = samplers[1](3)
    row = rows[7 + 3]
    assert (int(row["seed"]), int(row["index"])) == (9, 3)
    assert int(row["class_id"]) == ids.class_id
    assert row["class"] == dataset.classes[ids.class_id - 1]
    images = [row["query"], row["support_1"], row["support_2"]]
    assert images == [dataset.names[i] for i in (ids.query, *ids.supports)]


def test_the_same_episodes_have_the_same_hash(tmp_path, dataset, samplers):
    hashes = [
        export_episodes(tmp_path / name, dataset, samplers, count)
        for name, count in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def lines(path):
    return path.read_text().splitlines(keepends=True)


def test_a_changed_list_is_refused_until_its_hash_is_removed(listed, dataset):
    text = lines(listed)
    listed.write_text("".join(text[:-7]))
    with pytest.raises(InputError, match="was changed") as error:
        read_episodes(listed, dataset)
    assert str(listed) in str(error.value)
    listed.write_text("".join(text[1:-7]))
    assert read_episodes(listed, dataset).fields["seeds"] == (4,)


def test_what_does_not_fit_is_named(listed, dataset):
    header, first = lines(listed)[1:3]
    seed, index, class_id, name, query, one, two = first.strip().split(",")
    absent = int(np.argmin(dataset.counts[:, int(class_id) - 1]))

    def error(*cells, top=header):
        listed.write_text(top + ",".join(cells) + "\n")
        with pytest.raises(InputError) as info:
            read_episodes(listed, dataset)
        return str(info.value)

    assert "nothing" in error(seed, index, class_id, name, "nothing", one, two)
    assert "class 99" in error(seed, index, "99", name, query, one, two)
    assert "disc2" in error(seed, index, class_id, "disc2", query, one, two)
    assert "whole numbers" in error(seed, "x", class_id, name, query, one, two)
    listed.write_text(header + first + first)
    with pytest.raises(InputError, match="second index 0"):
        read_episodes(listed, dataset)
    assert "twice" in error(seed, index, class_id, name, query, one, one)
    shows = error(seed, index, class_id, name, query, one, dataset.names[absent])
    assert "shows no" in shows
    more, fewer = [seed, index, class_id, name, query, one, two, one], [seed, index]
    for row in (more, fewer):
        assert "episode 1: give a value for each of the 7 columns" in error(*row)
    twice = header.replace("support_2", "support_1")
    assert "query, support_1, support_1, not seed" in error(*more[:7], top=twice)
    assert "class, q, support_1" in error(seed, top=header.replace("query", "q"))
    listed.write_text(header)
    with pytest.raises(InputError, match="one at least"):
        read_episodes(listed, dataset)
    listed.write_bytes(b"# sha256 \xff\n")
    with pytest.raises(InputError, match="was changed"):
        read_episodes(listed, dataset)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no CSV"):
        read_episodes(listed, dataset)
