import contextlib
import copy
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.data.augmentation import Augmentation
from qpenet_jax.data.episodes import EpisodeIds, EpisodeSampler, eligible_pairs
from qpenet_jax.data.loader import load_episode, prefetched, training_batches
from qpenet_jax.data.sources.voc import VOCLayout
from qpenet_jax.data.transforms import binary_mask, fit, fit_label

CLASSES = (2, 3, 5)


def random_counts(images: int = 60, classes: int = 6) -> np.ndarray:
    """About a third of the pairs are eligible, a third too small, a third empty."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (images, classes))
    return np.choose(kinds, [0, rng.integers(1, 2048, kinds.shape), 2048 + kinds])


def sampler_of(shots: int = 1, seed: int = 7, **changes) -> EpisodeSampler:
    return EpisodeSampler(random_counts(), CLASSES, shots, seed, **changes)


# --- Which pairs are eligible ---


def test_eligible_pairs_by_hand():
    counts = np.array(
        [
            [2048, 0, 0],
            [2047, 5000, 0],
            [9000, 2048, 1],  # A single pixel of class 3 excludes it.
            [0, 0, 4000],
        ]
    )
    pairs = eligible_pairs(counts, (1, 2))
    assert pairs.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    pairs = eligible_pairs(counts, (2, 1), exclude=(3,))
    assert pairs.tolist() == [[0, 1], [1, 0], [0, 0], [0, 0]]
    pairs = eligible_pairs(counts, (3,), min_pixels=1)
    assert pairs.tolist() == [[0], [0], [1], [1]]
    pairs = eligible_pairs(np.array([[0], [1]]), (1,), min_pixels=0)
    assert pairs.tolist() == [[0], [1]]  # The class must be there.


# --- Drawing ---


@pytest.mark.parametrize("order", ["shuffled", "list", "pairs", "classes"])
@pytest.mark.parametrize(("shots", "exclude"), [(1, ()), (5, ()), (1, (1, 6))])
def test_every_episode_is_lawful(shots, exclude, order):
    sampler = sampler_of(shots, order=order, exclude=exclude, on_few="drop")
    pairs = eligible_pairs(sampler.counts, CLASSES, exclude)
    for i in range(400):
        ids = sampler(i)
        column = CLASSES.index(ids.class_id)
        assert ids.index == i
        assert pairs[ids.query, column]
        assert len(set(ids.supports)) == len(ids.supports) == shots
        assert ids.query not in ids.supports
        assert pairs[list(ids.supports), column].all()


def test_an_episode_depends_on_seed_and_index_alone():
    first = [sampler_of()(i) for i in range(150)]
    again = sampler_of()
    assert [again(i) for i in reversed(range(150))] == first[::-1]
    copy = pickle.loads(pickle.dumps(again))
    assert [copy(i) for i in range(150)] == first
    other = sampler_of(seed=8)
    assert sum(other(i) == ids for i, ids in enumerate(first)) < 10


KNOWN = [
    EpisodeIds(index=0, query=2, class_id=3, supports=(49, 55)),
    EpisodeIds(index=1, query=56, class_id=2, supports=(49, 9)),
    EpisodeIds(index=1000, query=17, class_id=3, supports=(22, 20)),
]


def test_known_episodes():
    """A change here would change every published number: don't adapt lightly."""
    sampler = sampler_of(shots=2, seed=0)
    assert [sampler(i) for i in (0, 1, 1000)] == KNOWN
    ids = sampler(3)
    assert {type(value) for value in (*ids[:3], *ids.supports)} == {int}


def test_every_image_is_query_once_per_epoch():
    sampler = sampler_of()
    listed = np.flatnonzero(eligible_pairs(sampler.counts, CLASSES).any(axis=1))
    assert 0 < len(listed) < 60
    assert len(sampler) == len(listed)
    orders = []
    for epoch in range(3):
        start = epoch * len(sampler)
        orders.append([sampler(start + i).query for i in range(len(sampler))])
        assert sorted(orders[-1]) == listed.tolist()
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != listed.tolist()


def test_class_and_supports_are_uniform():
    """One query image with two classes, five candidates as its support of each."""
    counts = np.zeros((11, 2), int)
    counts[:6, 0] = counts[5:, 1] = 4096
    sampler = EpisodeSampler(counts, (1, 2), shots=1, seed=0)
    drawn = Counter()
    for i in range(11 * 1000):
        ids = sampler(i)
        if ids.query == 5:
            drawn[ids.class_id, ids.supports[0]] += 1
    assert drawn.keys() == {(1, s) for s in range(5)} | {(2, s) for s in range(6, 11)}
    # Ten equal cells of 100; chi square with 9 degrees of freedom, p = 0.001.
    assert sum((n - 100) ** 2 / 100 for n in drawn.values()) < 27.9


def test_list_order_is_the_same_in_every_epoch():
    sampler = sampler_of(order="list")
    queries = [sampler(i).query for i in range(2 * len(sampler))]
    assert queries == [*sampler.images, *sampler.images]
    assert sampler(0).query == sampler_of(seed=8, order="list")(0).query
    classes = [sampler(i).class_id for i in range(200)]
    assert classes != [sampler(i + len(sampler)).class_id for i in range(200)]


def test_pair_order_goes_through_all_pairs():
    sampler = sampler_of(order="pairs")
    count = int(sampler.pairs.sum())
    drawn = [(sampler(i).query, sampler(i).class_id) for i in range(2 * count)]
    rows, columns = np.nonzero(sampler.pairs)
    expected = list(zip(rows.tolist(), np.take(CLASSES, columns).tolist(), strict=True))
    assert drawn == expected * 2


def test_class_order_draws_classes_uniformly():
    counts = np.zeros((40, 3), int)
    counts[:30, 0] = counts[30:35, 1] = counts[35:, 2] = 5000
    sampler = EpisodeSampler(counts, (1, 2, 3), 1, seed=0, order="classes")
    times = Counter(sampler(i).class_id for i in range(3000))
    assert all(abs(times[c] - 1000) < 4 * np.sqrt(3000 * 2 / 9) for c in (1, 2, 3))
    assert len({sampler(i).query for i in range(3000)}) == 40


def test_any_target_is_a_class_with_a_pixel_in_a_listed_query():
    sampler, counts = sampler_of(targets="any"), random_counts()
    seen = set()
    for i in range(2000):
        ids = sampler(i)
        assert ids.query in sampler.images
        seen.add((ids.query, ids.class_id))
        assert all(counts[s, ids.class_id - 1] >= 2048 for s in ids.supports)
        assert ids.query not in ids.supports
    shown = {
        (int(q), c) for q in sampler.images for c in CLASSES if counts[q, c - 1] > 0
    }
    assert seen == shown


# --- Importing ---


def test_importing_loads_nothing_that_only_some_commands_need():
    code = """
import sys
import qpenet_jax.data.episodes, qpenet_jax.data.loader, qpenet_jax.data.transforms
print([n for n in ("grain", "pycocotools", "scipy.io", "tensorflow_datasets")
       if n in sys.modules])
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"


# --- Too few images ---


def few(shots: int, **options) -> EpisodeSampler:
    """Class 1 has 4 images, class 2 two, one of them shared, class 3 none."""
    counts = np.zeros((5, 3), int)
    counts[:4, 0] = counts[3:, 1] = 2048
    return EpisodeSampler(counts, (1, 2, 3), shots, seed=0, **options)


def test_classes_with_exactly_enough_and_too_few_images():
    sampler = few(1)
    assert len(sampler) == 5
    assert {sampler(i).class_id for i in range(50)} == {1, 2}
    sampler = few(2, on_few="drop")
    assert sampler.images.tolist() == [0, 1, 2, 3]
    assert {sampler(i).class_id for i in range(50)} == {1}


NOTHING = np.zeros((4, 3), int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: few(2), r"class 2 has 2 image.*2-shot .*need 3"),
        (lambda: few(2, class_names=("a", "horse", "c")), "class horse has 2 image"),
        (lambda: EpisodeSampler(NOTHING, (1, 2), 1, 0), r"list .* is empty.*2048 pix"),
        (lambda: EpisodeSampler(NOTHING[:0], (1, 2), 1, 0), r"list of episodes is emp"),
        (lambda: sampler_of(shots=0), "shots 0"),
    ],
)
def test_too_few_images_and_no_shots_are_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- Loading ---

SIDE = 65


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_voc) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", images=12, classes=3)


def opened(root: Path) -> VOCLayout:
    return VOCLayout(root, root / "ids.txt", ("a", "b", "c"))


def small_sampler(dataset: VOCLayout, shots: int = 2) -> EpisodeSampler:
    return EpisodeSampler(dataset.counts, (1, 3), shots, seed=1, min_pixels=1000)


def batches(dataset: VOCLayout, count: int, **options) -> list[Episode]:
    """The first batches of two augmented episodes each."""
    how = {"side": SIDE, "seed": 5, "augmentation": Augmentation()}
    load = functools.partial(load_episode, dataset, **how)
    stream = training_batches(load, small_sampler(dataset), batch_size=2, **options)
    with contextlib.closing(stream):
        return list(itertools.islice(stream, count))


def same(first: Episode, second: Episode) -> bool:
    return all(map(np.array_equal, first, second))


def test_evaluation_episode_is_the_fitted_images(root):
    dataset = opened(root)
    ids = EpisodeIds(index=0, query=3, class_id=1, supports=(6, 0))
    episode = load_episode(dataset, ids, SIDE)
    assert episode.query_image.shape == (SIDE, SIDE, 3)
    assert episode.support_images.shape == (2, SIDE, SIDE, 3)
    np.testing.assert_array_equal(episode.query_image, fit(dataset.image(3), SIDE))
    for slot, item in enumerate(ids.supports):
        image = fit(dataset.image(item), SIDE)
        mask = fit_label(binary_mask(dataset.label(item), 1), SIDE)
        np.testing.assert_array_equal(episode.support_images[slot], image)
        np.testing.assert_array_equal(episode.support_masks[slot], mask)
    assert set(np.unique(episode.query_mask)) == {0, 1, 255}
    # Objects of other classes are background.
    ids = EpisodeIds(index=0, query=3, class_id=2, supports=(1,))
    assert set(np.unique(load_episode(dataset, ids, SIDE).query_mask)) == {0, 255}


def test_augmentation_differs_by_slot_index_and_seed(root):
    dataset, augmentation = opened(root), Augmentation()
    ids = EpisodeIds(index=4, query=3, class_id=1, supports=(3, 3))
    episode = load_episode(dataset, ids, SIDE, augmentation, seed=0)
    images = [
        episode.query_image,
        *episode.support_images,
        load_episode(dataset, ids, SIDE, augmentation, seed=1).query_image,
        load_episode(
            dataset, ids._replace(index=5), SIDE, augmentation, seed=0
        ).query_image,
    ]
    assert len({image.tobytes() for image in images}) == 5
    assert same(episode, load_episode(dataset, ids, SIDE, augmentation, seed=0))


def test_a_batch_stacks_episodes_whoever_loads_it(root):
    """Resuming, sharing between processes and loading in workers change nothing."""
    dataset = opened(root)
    sampler = small_sampler(dataset)
    whole = batches(dataset, 9)
    for t, batch in enumerate(whole[:3]):
        assert type(batch) is Episode
        assert batch.support_images.shape == (2, 2, SIDE, SIDE, 3)
        for j in range(2):
            ids = sampler(2 * t + j)
            alone = load_episode(dataset, ids, SIDE, Augmentation(), seed=5)
            assert same(Episode(*(field[j] for field in batch)), alone)
    assert not same(whole[0], whole[1])
    for workers, start in ((0, 5), (1, 0), (2, 3)):
        loaded = batches(dataset, 9 - start, workers=workers, start_step=start)
        assert type(loaded[0]) is Episode
        assert all(map(same, loaded, whole[start:]))
    parts = [batches(dataset, 9, shard=(p, 2)) for p in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first.query_mask) == len(second.query_mask) == 1
        both = map(np.concatenate, zip(first, second, strict=True))
        assert same(batch, Episode(*both))
    with pytest.raises(InputError, match="batch size 2 can't be shared by 3"):
        batches(dataset, 1, shard=(0, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_error(tmp_path, write_voc, workers):
    root = write_voc(tmp_path / "voc", images=12, classes=3)
    dataset = opened(root)
    broken = small_sampler(dataset)(0).query
    path = root / "JPEGImages" / f"{dataset.names[broken]}.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError) as error:
        batches(dataset, 20, workers=workers)
    message = str(error.value)
    assert message.startswith(f"{path}: broken image (")
    assert "truncated" in message
    assert "\n" not in message
    assert not getattr(error.value, "__notes__", [])


def test_image_and_label_of_other_sizes_are_an_error_when_they_are_loaded(root):
    dataset = opened(root)
    turned = copy.copy(dataset)
    turned.image = lambda index: np.rot90(dataset.image(index)).copy()
    with pytest.raises(InputError, match=rf"{dataset.names[0]}: mask of .*make them"):
        load_episode(turned, EpisodeIds(0, 0, 1, (3,)), SIDE)


LOADS = """
import contextlib, os, sys, time
import numpy as np
from qpenet_jax.data.loader import prefetched

def load(i):
    return os.getpid(), np.full((300, 300), i), np.full(3, i)

if __name__ == "__main__":
    with contextlib.closing(prefetched(load, range(1000), 2)) as stream:
        kept = [next(stream) for _ in range(5)]
        print(*{pid for pid, *_ in kept}, flush=True)
        time.sleep(int(sys.argv[1]))
    for i, (_, large, small) in enumerate(kept):
        assert large.max() == small.min() == i
"""


def loading(folder, seconds):
    script = folder / "loads.py"
    script.write_text(LOADS)
    words = [sys.executable, "-W", "always::UserWarning", script, str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, env=environment)


@pytest.mark.slow
def test_processes_that_load_leave_nothing_behind(tmp_path):
    """Neither shared memory, of which Python would warn, nor a word of their end."""
    process = loading(tmp_path, 0)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.slow
def test_processes_that_load_end_with_one_that_is_killed(tmp_path):
    with loading(tmp_path, 600) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
        process.wait()
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_at_3(by_itself, i):
    if i == 3:
        os._exit(1) if by_itself else os.kill(os.getpid(), signal.SIGKILL)
    return np.full(3, i)


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_process_that_loads_and_ends_is_named(by_itself):
    """What it loaded before may be lost with it, but comes in order if it comes.

    It ends by itself where a script without a guard is run again in it.
    """
    code = 1 if by_itself else -9
    words = rf"was killed .*exit code {code}, .*config.workers.*__main__"
    load, got = functools.partial(ended_at_3, by_itself), []
    with (
        pytest.raises(InputError, match=words),
        contextlib.closing(prefetched(load, range(9), 1)) as stream,
    ):
        got.extend(loaded.tolist() for loaded in stream)
    assert got == [[number] * 3 for number in range(len(got))]
