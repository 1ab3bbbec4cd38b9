"""Pictures of episodes: what is drawn into a tile, and sheets of tiles.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish; one
colour means the same on every sheet.
"""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.core.choices import Resize
from qpenet_jax.core.files import write_whole
from qpenet_jax.core.types import Array, Episode, SegmentationDataset
from qpenet_jax.data.episodes import EpisodeIds
from qpenet_jax.data.loader import load_episode
from qpenet_jax.data.transforms import binary_mask, unpad
from qpenet_jax.evaluation.metrics import count_pixels

RGB = UInt8[np.ndarray, "h w 3"]
Mask = UInt8[np.ndarray, "h w"]
Colour = tuple[int, int, int]

SUPPORT = (0, 114, 178)
TRUTH = (0, 158, 115)
PREDICTION = (213, 94, 0)
INK, PAPER = (34, 34, 34), (255, 255, 255)
TILE, GAP, HEADER, LINE, SWATCH = 224, 8, 30, 24, 14

LEGEND = {"annotated support": SUPPORT, "truth": TRUTH, "prediction": PREDICTION}

Row = tuple[str, Sequence[Image.Image]]
"""A label, with line breaks, and a tile for every column."""


def save_image(pixels: RGB, path: Path) -> None:
    """Writes a PNG whole or not at all; raises InputError where it can't be written."""
    content = io.BytesIO()
    # The default takes three times as long, for a file that is a sixth smaller.
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    write_whole(path, content.getvalue())


class Scene(NamedTuple):
    """What a figure shows of an episode, at original sizes; of K supports the first."""

    label: str
    query: RGB
    truth: Mask
    support: RGB
    support_mask: Mask


def read_scene(dataset: SegmentationDataset, ids: EpisodeIds) -> Scene:
    """Reads an episode's pictures, labelled by the class and the episode's index."""
    first = ids.supports[0]
    return Scene(
        f"{dataset.classes[ids.class_id - 1]}\n#{ids.index}",
        dataset.image(ids.query),
        binary_mask(dataset.label(ids.query), ids.class_id),
        dataset.image(first),
        binary_mask(dataset.label(first), ids.class_id),
    )


def load_batch_of_one(
    dataset: SegmentationDataset, ids: EpisodeIds, side: int, resize: Resize = "pad"
) -> Episode:
    """Loads one episode as a batch, at the size of the network's input in pixels."""
    loaded: Any = load_episode(dataset, ids, side, resize=resize)
    return Episode(*(x[None] for x in loaded))


def overlay(image: RGB, mask: Mask, colour: Colour = PREDICTION) -> RGB:
    """Tints the pixels of a mask and draws its contour.

    The picture is grey there: mixed with its own colours, the tint would be of another
    colour on every picture.
    """
    inside = mask == 1
    result = image.copy()  # uint8 throughout: photographs may have 48 million pixels
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[inside]
    result[inside] = grey[:, None] // 2 + np.array(colour, np.uint8) // 2
    return draw_contour(result, mask, colour)


def voc_colour(index: int) -> Colour:
    """Returns the colour of a class: neighbours differ in the highest bits.

    Source: the VOC development kit, VOCcode/VOClabelcolormap.m.
    """
    red, green, blue = (
        sum((index >> 3 * step + channel & 1) << 7 - step for step in range(3))
        for channel in range(3)
    )
    return red, green, blue


def class_overlay(image: RGB, index: Mask, classes: int) -> RGB:
    """Tints and outlines each class; several have the colours of their index mask."""
    if classes == 1:
        return overlay(image, index, PREDICTION)
    for number in range(1, classes + 1):
        mask = (index == number).astype(np.uint8)
        if mask.any():
            image = overlay(image, mask, voc_colour(number))
    return image


def draw_contour(
    image: RGB, mask: Mask, colour: Colour = TRUTH, share: int = 200
) -> RGB:
    """Draws the contour of a mask, as wide as 1 / `share` of the longer side."""
    inside = (mask == 1).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(mask.shape) / share))
    return cv2.drawContours(image.copy(), contours, -1, colour, width)


def found_mask(
    margin: Float[np.ndarray, "s s"], like: Mask, resize: Resize = "pad"
) -> Mask:
    """Returns where the margin is positive, unpadded to the size of a mask."""
    height, width = like.shape
    return (unpad(margin, height, width, resize) > 0).astype(np.uint8)


def iou_note(found: Mask, truth: Mask) -> str:
    """Returns the IoU of the foreground in percent, as tiles show it."""
    *_, both, either = count_pixels(found == 1, truth)
    return f"IoU {100 * both / max(either, 1):.0f}"


def annotated(scene: Scene) -> list[Image.Image]:
    """Returns the tiles of support, query and truth."""
    return [
        tile(overlay(scene.support, scene.support_mask, SUPPORT)),
        tile(scene.query),
        tile(overlay(scene.query, scene.truth, TRUTH)),
    ]


def prediction_row(
    scene: Scene,
    margins: Sequence[Float[np.ndarray, "s s"]],
    resize: Resize = "pad",
) -> Row:
    """Returns support, query, truth and the predictions with their IoU."""
    found = [found_mask(margin, scene.truth, resize) for margin in margins]
    tiles = [
        tile(overlay(scene.query, mask), iou_note(mask, scene.truth)) for mask in found
    ]
    return scene.label, [*annotated(scene), *tiles]


def episode_figure(
    dataset: SegmentationDataset,
    episodes: Sequence[EpisodeIds],
    predictors: Mapping[str, Callable[..., Float[Array, "1 s s"]]],
    side: int,
    resize: Resize = "pad",
) -> RGB:
    """Returns a row an episode: support with mask, query, truth, each prediction.

    The IoU of a prediction stands in its corner. What is compiled for scoring predicts.
    """
    rows = []
    for ids in episodes:
        episode = load_batch_of_one(dataset, ids, side, resize)
        margins = [
            np.asarray(predict(episode, in_both_roles=True))[0]
            for predict in predictors.values()
        ]
        rows.append(prediction_row(read_scene(dataset, ids), margins, resize))
    return sheet(("support", "query", "truth", *predictors), rows, LEGEND)


def tile(image: RGB, note: str = "") -> Image.Image:
    """Fits a picture into the top of a square, with a note in its corner."""
    picture = Image.fromarray(image)
    scale = TILE / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (TILE, TILE), PAPER)
    square.paste(picture, ((TILE - width) // 2, 0))
    if note:
        draw, font = ImageDraw.Draw(square), ImageFont.load_default(16)
        box = draw.textbbox((6, 5), note, font=font)
        draw.rectangle((0, 0, box[2] + 6, box[3] + 5), fill=INK)
        draw.text((6, 5), note, PAPER, font=font)
    return square


def sheet(
    columns: Sequence[str],
    rows: Sequence[Row],
    legend: dict[str, Colour],
    notes: Sequence[str] = (),
) -> RGB:
    """Arranges tiles under column titles, labels on their left, notes at the foot.

    Raises ValueError if a row doesn't have a tile for every column.
    """
    font, step = ImageFont.load_default(17), TILE + GAP
    left = 20 + max((_width(label, font) for label, _ in rows), default=0)
    foot = HEADER + step * len(rows)
    swatches = [SWATCH + _width(name, font) + 30 for name in legend]
    starts = list(itertools.accumulate(swatches, initial=10))
    words = (starts[-1], *(20 + _width(note, font) for note in notes))
    size = max(left + step * len(columns), *words), foot + LINE * (1 + len(notes)) + GAP
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(columns):
        centre = (left + step * i + TILE // 2, HEADER // 2)
        draw.text(centre, title, INK, font=_fitting_font(title), anchor="mm")
    for j, (label, tiles) in enumerate(rows):
        top = HEADER + step * j
        draw.text((10, top + 4), label, INK, font=font)
        for i, (_, square) in enumerate(zip(columns, tiles, strict=True)):
            page.paste(square, (left + step * i, top))
    for x, (name, colour) in zip(starts, legend.items(), strict=False):
        draw.rectangle((x, foot + 4, x + SWATCH, foot + 4 + SWATCH), fill=colour)
        draw.text((x + SWATCH + 6, foot + 1), name, INK, font=font)
    for k, note in enumerate(notes, start=1):
        draw.text((10, foot + LINE * k), note, INK, font=font)
    return np.asarray(page)


def _width(text, font) -> int:
    return math.ceil(max(font.getlength(line) for line in text.split("\n")))


def _fitting_font(title):
    """Returns the largest font, up to 17 pixels, in which a title fits its tile."""
    fonts = [ImageFont.load_default(size) for size in range(17, 7, -1)]
    return next((font for font in fonts if _width(title, font) <= TILE), fonts[-1])
