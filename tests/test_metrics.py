"""Metrics against confusion matrices of random label maps, and their intervals."""

import time

import numpy as np
import pytest

from qpenet_jax.core.errors import InputError
from qpenet_jax.evaluation.metrics import (
    SCORE_COLUMNS,
    Scores,
    common_episodes,
    count_pixels,
    estimate,
    estimate_difference,
    load_scores,
    mean_iou,
    seed_mean_iou,
)

CLASSES = (6, 7, 8, 9, 10)  # 9 is in the label maps but never drawn
SEEDS = (0, 3, 4)  # seed 4 never draws class 10
IMAGES = 12
SAMPLES = 2000


# An independent implementation: confusion matrices over whole label maps, where
# everything that isn't the class of the episode is background once it is summed up.


def confusion(label, predicted):
    """Return `matrix[truth, predicted]` over 0..20, pixel by pixel; 255 counts not."""
    matrix = np.zeros((21, 21))
    for truth, found in zip(label.ravel(), predicted.ravel(), strict=True):
        if truth != 255:
            matrix[truth, found] += 1
    return matrix


def by_hand(episodes):
    """Return a function of the images' weights: `[seeds, classes]` and FB `[seeds]`."""
    matrices = np.stack([m for *_, m in episodes])
    s, query, c = (np.array([e[k] for e in episodes]) for k in range(3))
    both = matrices[np.arange(len(c)), c, c]
    truth = matrices[np.arange(len(c)), c].sum(axis=1)
    found = matrices[np.arange(len(c)), :, c].sum(axis=1)
    either, pixels = truth + found - both, matrices.sum(axis=(1, 2))

    def statistic(weight):
        w, ious, fb = weight[query], np.zeros((len(SEEDS), len(CLASSES))), []
        for i, seed in enumerate(SEEDS):
            for j, class_id in enumerate(CLASSES):
                mine = (s == seed) & (c == class_id)
                if mine.any():
                    ious[i, j] = w[mine] @ both[mine] / (w[mine] @ either[mine])
            v = w * (s == seed)
            foreground = v @ both / (v @ either)
            background = v @ (pixels - either) / (v @ (pixels - both))
            fb.append((foreground + background) / 2)
        return ious, np.array(fb)

    return statistic


def means(ious, fb_ious):
    """Return the seeds' means: IoU of each class, mIoU, FB-IoU."""
    return np.array([*ious.mean(axis=0), ious.mean(), fb_ious.mean()])


def run(seed, quality=30, count=40):
    """Return scores of random predictions and (seed, query, class, matrix) of each."""
    rng = np.random.default_rng(seed)
    labels = [
        rng.choice([0, *CLASSES, 255], rng.integers(3, 9, 2)).astype(np.uint8)
        for _ in range(IMAGES)
    ]
    rows, episodes = [], []
    for s in SEEDS:
        for index in range(count):
            drawn = [6, 7, 8] if s == 4 else [6, 7, 8, 10]
            class_id, query = int(rng.choice(drawn)), int(rng.integers(IMAGES))
            label = labels[query]
            found = (label == class_id) ^ (rng.random(label.shape) < class_id / quality)
            mask = np.where(label == 255, 255, label == class_id).astype(np.uint8)
            counts = count_pixels(found, mask)
            rows.append((s, index, query, class_id, *counts))
            matrix = confusion(label, found * class_id)
            episodes.append((s, query, class_id, matrix))
    return Scores(np.array(rows, np.int64)), episodes


@pytest.fixture(scope="module")
def experiment():
    return run(0)


def plain_intervals(statistic):
    """Return `[measures, 2]`: 95 % intervals over exponential weights of the images."""
    draws = np.random.default_rng(0).exponential(size=(SAMPLES, IMAGES))
    values = [statistic(draw) for draw in draws]
    return np.percentile(values, [2.5, 97.5], axis=0).T


def flat(estimates):
    return np.array([*estimates.per_class, estimates.miou, estimates.fb_iou])


def test_all_intervals_are_those_of_a_plain_bootstrap(experiment):
    scores, episodes = experiment
    in_seeds, found = by_hand(episodes), flat(estimate(scores, CLASSES))
    by_seed, fb_ious = in_seeds(np.ones(IMAGES))
    assert by_seed[:, 3].max() == by_seed[2, 4] == 0, "never drawn"
    assert (by_seed[:2, [0, 1, 2, 4]] > 0).all()
    mean_ious = seed_mean_iou(scores, CLASSES)
    assert list(mean_ious) == list(SEEDS)
    np.testing.assert_allclose(list(mean_ious.values()), by_seed.mean(axis=1))
    assert mean_iou(scores, CLASSES) == found[5, 0]
    reordered = flat(estimate(scores, (10, 6)))
    np.testing.assert_array_equal(reordered[[0, 1]], found[[4, 0]])
    np.testing.assert_allclose(found[:, 0], means(by_seed, fb_ious))
    expected = plain_intervals(lambda weight: means(*in_seeds(weight)))
    np.testing.assert_allclose(found[:, 1:], expected)
    np.testing.assert_array_equal(found[3], 0)
    assert (found[[0, 5, 6], 1] < found[[0, 5, 6], 0]).all()
    assert (found[[0, 5, 6], 0] < found[[0, 5, 6], 2]).all()


def test_all_paired_differences_are_those_of_a_plain_bootstrap(experiment):
    (first, episodes), (second, others) = experiment, run(0, quality=20)
    first_at, second_at = by_hand(episodes), by_hand(others)
    np.testing.assert_array_equal(first.rows[:, :4], second.rows[:, :4])

    def difference(weight):
        return means(*first_at(weight)) - means(*second_at(weight))

    found = flat(estimate_difference(first, second, CLASSES))
    np.testing.assert_allclose(found[:, 0], difference(np.ones(IMAGES)), atol=1e-12)
    np.testing.assert_allclose(found[:, 1:], plain_intervals(difference), atol=1e-12)
    assert found[5, 1] > 0, "the worse one is worse for sure"


def test_bootstrap_is_fast_enough_for_five_seeds_of_5000_episodes():
    rng = np.random.default_rng(0)
    count = 5 * 5000
    rows = np.zeros((count, 8), np.int64)
    rows[:, 0], rows[:, 1] = np.divmod(np.arange(count), 5000)
    rows[:, 2] = rng.integers(15000, size=count)
    rows[:, 3] = 1 + rows[:, 2] % 20
    rows[:, 5] = rows[:, 7] = 1000
    rows[:, 4], rows[:, 6] = rng.integers(1000, size=(2, count))
    start = time.process_time()
    estimate(Scores(rows), range(1, 21))
    assert time.process_time() - start < 6, "0.4 s on two cores, room for slow ones"


def test_files_keep_every_number(experiment, tmp_path):
    scores, _ = experiment
    scores.save(tmp_path / "scores.csv")
    text = (tmp_path / "scores.csv").read_text().splitlines()
    assert text[0] == ",".join(SCORE_COLUMNS)
    loaded = load_scores(tmp_path / "scores.csv")
    np.testing.assert_array_equal(loaded.rows, scores.rows)
    assert loaded.rows.dtype == np.int64

    Scores(scores.rows[:1]).save(tmp_path / "one.csv")
    assert load_scores(tmp_path / "one.csv").rows.shape == (1, 8)


HEADER = ",".join(SCORE_COLUMNS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        HEADER.encode(),
        f"{HEADER}\n0,0,1,6,1,2,3\n".encode(),
        f"{HEADER}\n0,0,1,6,1,2,3,4\n0,1\n".encode(),
        f"{HEADER}\n0,0,1,6,1,2,3,x\n".encode(),
        f"{HEADER}\n0,0,1,6,1,2,3,{2**70}\n".encode(),
        b"a,b\n1,2\n",
        b"\x89PNG\r\n\xff\xfe",
    ],
)
def test_a_broken_file_is_one_line_that_names_it(content, tmp_path):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.csv: not a whole file .* again$"):
        load_scores(path)
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        load_scores(tmp_path / "none.csv")


def test_interval_is_that_of_the_mean():
    """With equal unions mIoU is a mean of n numbers: +- 1.96 s / sqrt(n)."""
    rows = np.zeros((400, 8), np.int64)
    rows[:, 1] = rows[:, 2] = np.arange(400)
    rows[:, 3], rows[:, 7] = 1, 1000
    rows[:, 6] = 1000 * np.clip(np.random.default_rng(0).normal(0.5, 0.1, 400), 0, 1)
    scores = Scores(rows)
    values = scores.column("foreground_intersection") / 1000
    miou = estimate(scores, [1]).miou
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        miou, values.mean() + np.array([0, -half, half]), atol=2e-3
    )
    assert estimate(scores, [1]).miou == miou, "deterministic"


def test_differences_are_taken_on_common_episodes_only(experiment):
    scores, _ = experiment
    rng = np.random.default_rng(0)
    other = scores.rows.copy()
    # Another index, query, class or seed each; then shuffled, with more behind.
    for column, row in enumerate((3, 50, 70, 90)):
        other[row, column] += 100
    kept = rng.permutation(len(other))[:100]
    more = scores.rows[:5] + np.array([7, *[0] * 7])
    common = sorted(set(kept) - {3, 50, 70, 90})
    for first, second in (
        common_episodes(scores, Scores(np.concatenate([more, other[kept]]))),
        common_episodes(Scores(other[kept]), scores),
    ):
        np.testing.assert_array_equal(first.rows, scores.rows[common])
        np.testing.assert_array_equal(second.rows, scores.rows[common])
    for column in range(4):
        others = scores.rows.copy()
        others[:, column] += 1000
        with pytest.raises(InputError, match="no episode in common"):
            estimate_difference(scores, Scores(others), CLASSES)
