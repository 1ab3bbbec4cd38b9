"""The draws of training augmentation: every published run depends on them."""

import pytest

from qpenet_jax.data.augmentation import Augmentation, draw
from qpenet_jax.data.episodes import AUGMENT_STREAM, generator

AUGMENTATIONS = {
    "all": Augmentation(),
    "coco": Augmentation((0.8, 1.25)),
    "no rotation": Augmentation(rotate=0.0),
    "no blur": Augmentation(blur=False),
    "no flip": Augmentation(flip=False),
    "none": Augmentation((1.0, 1.0), rotate=0.0, blur=False, flip=False),
}
SIZES = [(375, 500), (500, 375), (60, 75), (41, 41), (20, 90), (90, 20), (1, 1)]


def drawn_one_by_one(rng, augmentation, size, side):
    """Numbers in the order of the operations, a call for each."""
    factor = rng.uniform(*augmentation.scale)
    scaled = tuple(max(round(n * factor), 1) for n in size)
    angle, blur, flip = 0.0, False, False
    if augmentation.rotate and rng.random() < 0.5:
        angle = rng.uniform(-augmentation.rotate, augmentation.rotate)
    if augmentation.blur:
        blur = rng.random() < 0.5
    if augmentation.flip:
        flip = rng.random() < 0.5
    padded = [max(n, side) for n in scaled]
    corners = [[int(rng.integers(n - side + 1)) for n in padded] for _ in range(32)]
    return scaled, angle, blur, flip, corners


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_order_of_the_draws(name):
    for index in range(100):
        size = SIZES[index % len(SIZES)]
        rngs = [generator(5, AUGMENT_STREAM, index, 1) for _ in range(2)]
        *ours, corners = draw(rngs[0], AUGMENTATIONS[name], size, 41)
        *theirs, expected = drawn_one_by_one(rngs[1], AUGMENTATIONS[name], size, 41)
        assert ours == theirs
        assert corners.tolist() == expected


def test_known_draws():
    """A change here would change every training run: don't adapt lightly."""
    drawn = draw(generator(0, AUGMENT_STREAM, 8, 2), Augmentation(), (375, 500), 321)
    assert drawn[:4] == ((342, 456), 7.889166553141088, False, False)
    assert drawn.corners.shape == (32, 2)
    assert drawn.corners[[0, 1, 31]].tolist() == [[4, 115], [19, 89], [13, 1]]
