"""Metrics against confusion matrices of random label maps, and their intervals."""

import numpy as np
import pytest

from qpenet_jax.metrics import (
    COLUMNS,
    Scores,
    bootstrap,
    class_iou,
    count_pixels,
    fb_iou,
    interval,
    load_scores,
    mean_iou,
    paired_difference,
    seed_iou,
)

CLASSES = (6, 7, 8, 9, 10)  # 9 is never drawn
SEEDS = (0, 3)


def confusion(prediction, mask):
    """Return `matrix[truth, prediction]` over the pixels that aren't 255."""
    matrix = np.zeros((2, 2), int)
    valid = mask != 255
    np.add.at(matrix, (mask[valid], prediction[valid].astype(int)), 1)
    return matrix


def iou(matrix, c):
    union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
    return matrix[c, c] / union if union else 0.0


@pytest.fixture(scope="module")
def experiment():
    """Return scores and, for every episode, (seed, class, confusion matrix)."""
    rng = np.random.default_rng(0)
    rows, episodes = [], []
    for seed in SEEDS:
        for index in range(30):
            class_id = int(rng.choice([6, 7, 8, 10]))
            shape = rng.integers(3, 12, 2)
            mask = rng.choice([0, 1, 255], shape, p=[0.6, 0.3, 0.1]).astype(np.uint8)
            wrong = rng.random(shape) < class_id / 30  # later classes are harder
            prediction = (mask == 1) ^ wrong
            counts = count_pixels(prediction, mask)
            rows.append((seed, index, int(rng.integers(12)), class_id, *counts))
            episodes.append((seed, class_id, confusion(prediction, mask)))
    return Scores(np.array(rows, np.int64)), episodes


def summed(episodes, seed=None, class_id=None):
    zero = np.zeros((2, 2), int)
    return zero + sum(
        m for s, c, m in episodes if seed in (None, s) and class_id in (None, c)
    )


def expected_iou(episodes):
    """Return `[seeds, classes]`."""
    return [[iou(summed(episodes, s, c), 1) for c in CLASSES] for s in SEEDS]


def test_counts_of_every_episode(experiment):
    scores, episodes = experiment
    for row, (_, _, m) in zip(scores.rows, episodes, strict=True):
        background, foreground = m[0].sum(), m[1].sum()
        assert row[4:].tolist() == [
            m[0, 0],
            background + m[1, 0],
            m[1, 1],
            foreground + m[0, 1],
        ]


def test_counts_by_hand():
    mask = np.array([[1, 1, 0, 255], [0, 0, 1, 255]], np.uint8)
    found = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool)
    assert count_pixels(found, mask) == (2, 5, 1, 4)
    assert count_pixels(found, np.full_like(mask, 255)) == (0, 0, 0, 0)


def test_class_iou_and_its_means(experiment):
    scores, episodes = experiment
    expected = np.array(expected_iou(episodes))
    assert expected[:, 3].max() == 0
    assert expected[:, :3].min() > 0
    np.testing.assert_allclose(class_iou(scores, CLASSES), expected.mean(axis=0))
    np.testing.assert_allclose(mean_iou(scores, CLASSES), expected.mean())
    by_seed = seed_iou(scores, CLASSES)
    assert list(by_seed) == list(SEEDS)
    np.testing.assert_allclose(list(by_seed.values()), expected)


def test_classes_are_returned_in_the_order_asked_for(experiment):
    scores, _ = experiment
    all_of_them = dict(zip(CLASSES, class_iou(scores, CLASSES), strict=True))
    np.testing.assert_allclose(
        class_iou(scores, (10, 6)), [all_of_them[10], all_of_them[6]]
    )


def test_fb_iou(experiment):
    scores, episodes = experiment
    matrix = summed(episodes)
    np.testing.assert_allclose(fb_iou(scores), (iou(matrix, 0) + iou(matrix, 1)) / 2)


def test_weights_repeat_episodes(experiment):
    scores, _ = experiment
    weights = np.random.default_rng(1).integers(0, 3, len(scores.rows))
    repeated = Scores(np.repeat(scores.rows, weights, axis=0))
    np.testing.assert_allclose(
        class_iou(scores, CLASSES, weights.astype(float)), class_iou(repeated, CLASSES)
    )


def test_files_keep_every_number(experiment, tmp_path):
    scores, _ = experiment
    scores.save(tmp_path / "scores.csv")
    text = (tmp_path / "scores.csv").read_text().splitlines()
    assert text[0] == ",".join(COLUMNS)
    loaded = load_scores(tmp_path / "scores.csv")
    np.testing.assert_array_equal(loaded.rows, scores.rows)
    assert loaded.rows.dtype == np.int64

    Scores(scores.rows[:1]).save(tmp_path / "one.csv")
    assert load_scores(tmp_path / "one.csv").rows.shape == (1, 8)


def draw_scores(images, rng, mean=0.5):
    """Return one episode an image of class 1, IoU spread by 0.1 about `mean`."""
    found = 1000 * np.clip(rng.normal(mean, 0.1, images), 0, 1)
    rows = np.zeros((images, 8), np.int64)
    rows[:, 1] = rows[:, 2] = np.arange(images)
    rows[:, 3] = 1
    rows[:, 6], rows[:, 7] = found, 1000
    return Scores(rows)


def test_interval_is_that_of_the_mean():
    """With equal unions mIoU is a mean of n numbers: +- 1.96 s / sqrt(n)."""
    scores = draw_scores(400, np.random.default_rng(0))
    values = scores.column("foreground_intersection") / 1000
    low, high = interval(scores, [1])
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        [low, high], values.mean() + np.array([-half, half]), atol=2e-3
    )
    assert interval(scores, [1]) == (low, high), "deterministic"


def test_episodes_of_one_query_are_not_counted_as_independent():
    scores = draw_scores(50, np.random.default_rng(0))
    four_times = Scores(np.repeat(scores.rows, 4, axis=0))
    np.testing.assert_allclose(
        interval(four_times, [1]), interval(scores, [1]), rtol=1e-9
    )


def test_bootstrap_of_a_constant_is_a_point():
    scores = draw_scores(5, np.random.default_rng(0))
    assert bootstrap(lambda weights: 0.25, scores, samples=10) == (0.25, 0.25)


def test_paired_difference_cancels_what_episodes_share():
    rng = np.random.default_rng(0)
    theirs = draw_scores(200, rng)
    better = theirs.rows.copy()
    better[:, 6] = np.minimum(better[:, 6] + 20 + rng.integers(0, 10, 200), 1000)
    difference, low, high = paired_difference(Scores(better), theirs, [1])
    gain = (better[:, 6] - theirs.rows[:, 6]).mean() / 1000
    np.testing.assert_allclose(difference, gain)
    assert low < gain < high
    assert high - low < 0.1 * np.subtract(*interval(theirs, [1])[::-1])


def test_paired_difference_refuses_other_episodes():
    ours = draw_scores(9, np.random.default_rng(0))
    rows = ours.rows.copy()
    rows[4, 2] += 1
    for theirs in (Scores(rows), Scores(ours.rows[:8])):
        with pytest.raises(ValueError, match="not scored on the same episodes"):
            paired_difference(ours, theirs, [1])


def test_interval_keeps_classes_with_few_images():
    """Losing a class of two images in a resample must not count as its failure."""
    common, rare = (draw_scores(n, np.random.default_rng(n)).rows for n in (200, 2))
    rare[:, 2] += 200
    rare[:, 3] = 2
    scores = Scores(np.concatenate([common, rare]))
    worst = class_iou(scores, [1])[0] - 0.05, rare[:, 6].min() / 1000
    assert interval(scores, [1, 2])[0] > np.mean(worst)
