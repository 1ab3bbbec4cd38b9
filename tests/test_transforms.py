import cv2
import numpy as np
import pytest

from qpenet_jax.data.augmentation import Augmentation, ImageDraws, augment, draw
from qpenet_jax.data.episodes import AUGMENT_STREAM, generator
from qpenet_jax.data.transforms import binary_mask, content_size, fit, fit_label, unpad

MEAN = np.array([124, 116, 104])


def augmented(image, mask, side: int, corners=((0, 0),), **changes):
    """Augment by draws that change nothing but what is given."""
    draws = ImageDraws(mask.shape, 0.0, blur=False, flip=False, corners=None)
    draws = draws._replace(corners=np.array(corners), **changes)
    return augment(image, mask, side, draws)


def smooth_image(height: int, width: int) -> np.ndarray:
    """Slow waves: neighbouring pixels differ by a few grey levels."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / 9 + y / 17 + c) + np.cos(y / 11 - x / 23 + 2 * c) for c in (0, 1, 2)
    ]
    return np.round(127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)


def blocks(height: int, width: int) -> np.ndarray:
    """A mask of 0, 1 and 255 in blocks of 10 pixels."""
    y, x = np.mgrid[:height, :width] // 10
    return np.array([0, 1, 255, 1, 0], np.uint8)[(2 * y + x) % 5]


def bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample at real coordinates by the definition, edges repeated."""
    height, width = image.shape[:2]
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    b, r = (y - top)[..., None], (x - left)[..., None]
    image = image.astype(np.float64)
    upper = image[top, left] * (1 - r) + image[top, right] * r
    return (
        upper * (1 - b) + (image[bottom, left] * (1 - r) + image[bottom, right] * r) * b
    )


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres: pixel i of the output lies at (i + 0.5) * ratio - 0.5."""
    y = (np.arange(height) + 0.5) * image.shape[0] / height - 0.5
    x = (np.arange(width) + 0.5) * image.shape[1] / width - 0.5
    return bilinear(image, *np.meshgrid(y, x, indexing="ij"))


def nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixel whose area holds the centre of the output pixel, in integers."""
    y = (2 * np.arange(height) + 1) * label.shape[0] // (2 * height)
    x = (2 * np.arange(width) + 1) * label.shape[1] // (2 * width)
    return label[np.ix_(y, x)]


def close(image: np.ndarray, expected: np.ndarray, within: float) -> None:
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= within


# --- Evaluation ---


@pytest.mark.parametrize(
    ("height", "width", "side", "size"),
    [
        (375, 500, 473, (352, 472)),  # int(354.75) = 354, floored to 352.
        (372, 500, 473, (344, 472)),  # int(351.91) = 351: not rounded.
        (500, 375, 473, (472, 352)),
        (473, 473, 473, (472, 472)),
        (1, 1, 473, (472, 472)),
        (5000, 3, 473, (472, 8)),
        (3, 5000, 473, (8, 472)),
        (333, 500, 473, (312, 472)),
        (6000, 8000, 473, (352, 472)),
        (100, 49, 49, (48, 24)),  # Exactly 24.01.
        (49, 49, 480, (480, 480)),  # 49 * (480 / 49) isn't 480 in floats everywhere.
        (64, 64, 321, (320, 320)),
    ],
)
def test_content_size(height, width, side, size):
    assert content_size(height, width, side) == size
    assert all(content_size(n, n, 480) == (480, 480) for n in range(1, 3000))
    label = fit_label(np.ones((height, width), np.uint8), side)
    assert label.shape == (side, side)
    assert (label[: size[0], : size[1]] == 1).all()
    assert (label == 1).sum() == size[0] * size[1]
    assert (label == 255).sum() == side * side - size[0] * size[1]


@pytest.mark.parametrize("resize", ["pad", "squash"])
@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 281), (50, 60), (900, 1300), (1, 1)]
)
def test_fit_and_fit_label(shape, resize):
    height, width = content_size(*shape, 473, resize)
    assert (height, width) == (473, 473) or resize == "pad"
    image = smooth_image(*shape)
    fitted = fit(image, 473, resize)
    assert fitted.shape == (473, 473, 3)
    # OpenCV weighs with 11 bits, then rounds.
    close(fitted[:height, :width], resized(image, height, width), within=1)
    fitted[:height, :width] = 0
    assert not fitted.any()
    label = np.random.default_rng(0).integers(0, 21, shape, np.uint8)
    fitted = fit_label(label, 473, resize)
    expected = nearest(label, height, width)
    # Where a centre falls on the edge of two pixels OpenCV's fixed point may differ.
    assert (fitted[:height, :width] == expected).mean() > 0.995
    assert (fitted[height:] == 255).all()
    assert (fitted[:, width:] == 255).all()


@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_unpad_undoes_fit(resize):
    """The content alone is resized to the image's size; padding leaves no trace."""
    rows, columns = content_size(75, 100, 97, resize)
    margin = np.full((97, 97), np.nan, np.float32)
    margin[:rows, :columns] = smooth_image(rows, columns)[..., 0]
    expected = resized(margin[:rows, :columns, None], 75, 100)[..., 0]
    np.testing.assert_allclose(unpad(margin, 75, 100, resize), expected, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (40, 30)])
def test_binary_mask(shape):
    labels = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    for label in (labels[0], labels.transpose(1, 2, 0)[..., 1]):  # The latter strided.
        for class_id in (1, 20, 80):
            expected = np.select([label == 255, label == class_id], [255, 1], 0)
            mask = binary_mask(label, class_id)
            assert (mask.shape, mask.dtype) == (shape, np.uint8)
            assert (mask == expected).all()


# --- Training ---


def placed(array: np.ndarray, side: int, fill) -> np.ndarray:
    """Centre an array on a canvas, top and left getting the floor of half the rest."""
    canvas = np.empty((side, side, *array.shape[2:]))
    canvas[:] = fill
    top, left = ((side - n) // 2 for n in array.shape[:2])
    canvas[top : top + array.shape[0], left : left + array.shape[1]] = array
    return canvas


def test_padding_is_centred_with_the_mean_colour_and_ignore():
    image, mask = smooth_image(50, 61), blocks(50, 61)
    padded, padded_mask = augmented(image, mask, 81)
    close(padded, placed(image, 81, MEAN), within=0)
    close(padded_mask, placed(mask, 81, 255), within=0)
    assert padded[14, 40].tolist() == MEAN.tolist()  # Rows 0..14 are padding,
    assert padded[15, 10].tolist() == image[0, 0].tolist()  # columns 0..9 as well.
    imagenet = 255 * np.array([0.485, 0.456, 0.406])
    assert (np.round(imagenet) == MEAN).all()


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_scale(factor):
    image, mask = smooth_image(60, 75), blocks(60, 75)
    height, width = round(60 * factor), round(75 * factor)
    scaled, scaled_mask = augmented(image, mask, 97, scaled=(height, width))
    expected = resized(image, height, width)
    close(scaled, placed(expected, 97, MEAN), within=1)
    expected = placed(nearest(mask, height, width), 97, 255)
    assert (scaled_mask == expected).mean() > 0.99


def turned_coordinates(height, width, angle):
    """Where each output pixel comes from; positive angles turn counter-clockwise."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = y - height / 2, x - width / 2
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return height / 2 + sin * x + cos * y, width / 2 + cos * x - sin * y


@pytest.mark.parametrize("angle", [-10.0, 4.3, 10.0])
def test_rotation(angle):
    image, mask = smooth_image(81, 81), blocks(81, 81)
    turned, turned_mask = augmented(image, mask, 81, angle=angle)
    y, x = turned_coordinates(81, 81, angle)
    inside = (y >= 0) & (y <= 80) & (x >= 0) & (x <= 80)
    outside = (y < -1) | (y > 81) | (x < -1) | (x > 81)
    assert outside.sum() > 50
    # OpenCV rounds coordinates to 1/32 pixel: up to a level on these slopes.
    assert np.abs(turned - bilinear(image, y, x))[inside].max() <= 2
    assert (turned[outside] == MEAN).all()
    rows, columns = (np.clip(np.round(c), 0, 80).astype(int) for c in (y, x))
    assert (turned_mask == mask[rows, columns])[inside].mean() > 0.98
    assert (turned_mask[outside] == 255).all()


@pytest.mark.parametrize("shape", [(375, 500), (7, 90), (1, 5), (64, 64)])
def test_rotation_of_noise_is_opencvs_of_every_channel(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    mask, side = np.ones(shape, np.uint8), max(shape)
    for angle in (-10.0, -0.3, 6.1):
        turned, turned_mask = augmented(image, mask, side, angle=angle)
        centre = (shape[1] / 2, shape[0] / 2)
        turn = (cv2.getRotationMatrix2D(centre, angle, 1.0), shape[::-1])
        planes = [
            cv2.warpAffine(plane, *turn, borderValue=int(mean))
            for plane, mean in zip(cv2.split(image), MEAN, strict=True)
        ]
        close(turned, placed(np.stack(planes, -1), side, MEAN), within=1)
        expected = cv2.warpAffine(mask, *turn, flags=cv2.INTER_NEAREST, borderValue=255)
        close(turned_mask, placed(expected, side, 255), within=0)


def blurred(image: np.ndarray) -> np.ndarray:
    """Weights 1, 4, 6, 4, 1 of 16 each way, mirrored at the borders."""
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    height, width = image.shape[:2]
    border = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect").astype(float)
    places = [(i, j) for i in range(5) for j in range(5)]
    return sum(kernel[i, j] * border[i : i + height, j : j + width] for i, j in places)


def test_blur_and_flip():
    image, mask = smooth_image(40, 40), blocks(40, 40)
    image[::7, ::5] = 255
    out, out_mask = augmented(image, mask, 40, blur=True)
    close(out, blurred(image), within=0.51)
    close(out_mask, mask, within=0)
    out, out_mask = augmented(image, mask, 40, flip=True)
    close(out, image[:, ::-1], within=0)
    close(out_mask, mask[:, ::-1], within=0)


def test_order_of_the_steps():
    """Scale, rotate, blur, flip, pad: another order gives other pixels."""
    image = smooth_image(80, 80)
    image[20:40, 30:50] = 255
    changes = {"scaled": (88, 88), "angle": 8.0, "blur": True, "flip": True}
    out, _ = augmented(image, blocks(80, 80), 97, **changes)
    y, x = turned_coordinates(88, 88, 8)
    bigger = np.pad(
        resized(image, 88, 88) - MEAN, ((1, 1), (1, 1), (0, 0))
    )  # Bilinear blending into the border colour.
    step = bilinear(bigger, y + 1, x + 1) + MEAN
    step = blurred(step)
    # Three roundings to uint8 and OpenCV's 1/32 pixel at the edges of the square.
    close(out, placed(step[:, ::-1], 97, MEAN), within=5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 90), (90, 2), (33, 33), (500, 375)])
def test_any_size_becomes_the_square(shape):
    """The inputs stay, and the draws alone decide."""
    rng, outs = np.random.default_rng(0), set()
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    mask = rng.integers(0, 2, shape, np.uint8)
    before = image.tobytes(), mask.tobytes()
    for _ in range(16):
        draws = draw(rng, Augmentation((0.3, 1.25)), shape, 33)
        out, out_mask = augment(image, mask, 33, draws)
        again = augment(image, mask, 33, draws)
        assert all(map(np.array_equal, again, (out, out_mask)))
        assert (image.tobytes(), mask.tobytes()) == before
        outs.add(out.tobytes())
        assert (out.shape, out.dtype) == ((33, 33, 3), np.uint8)
        assert (out_mask.shape, out_mask.dtype) == ((33, 33), np.uint8)
        assert set(np.unique(out_mask)) <= {0, 1, 255}
    assert len(outs) > 8


LINE = np.full((40, 60), 255, np.uint8)  # Ignored pixels don't count.
LINE[5, :20] = 1
SQUARE, CORNERS = np.zeros((2, 50, 60), np.uint8)
SQUARE[20:30, 30:40] = CORNERS[::49, ::59] = 1


@pytest.mark.parametrize(
    ("mask", "side", "tries", "taken"),
    [
        (SQUARE, 20, [(0, 0), (30, 40), (15, 25), (20, 30)], 2),
        (SQUARE, 20, [(0, 0), (30, 40), (20, 30), (15, 25)], 2),
        (LINE, 30, [(0, 4), (0, 3), (0, 2)], 1),  # They keep 16, 17 and 18 of 20.
        (CORNERS, 20, [(0, 0)] + [(i % 30, 3 * i % 40) for i in range(1, 32)], 31),
        (np.zeros((60, 60), np.uint8), 33, [(7, 4), (0, 0)], 0),
    ],
)
def test_the_first_crop_that_keeps_85_percent_is_taken_or_the_last(
    mask, side, tries, taken
):
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.uint8)
    image = np.stack([y, x, y], axis=-1)  # It holds its own coordinates.
    crop, crop_mask = augmented(image, mask, side, tries)
    top, left = (int(n) for n in crop[0, 0, :2])
    window = np.s_[top : top + side, left : left + side]
    assert (crop == image[window]).all()
    assert (crop_mask == mask[window]).all()
    assert (top, left) == tries[taken]


# --- The draws: every published run depends on them ---

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
