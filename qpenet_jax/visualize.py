"""Pictures of episodes: support, query, truth, prediction."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from qpenet_jax.episodes import EpisodeIds, load_episode
from qpenet_jax.evaluation import unpad
from qpenet_jax.metrics import count_pixels
from qpenet_jax.transforms import Resize, binary_mask
from qpenet_jax.typing import Episode, SegmentationDataset

RGB = UInt8[np.ndarray, "h w 3"]

SUPPORT = (46, 134, 222)
TRUTH = (39, 174, 96)
PREDICTION = (231, 76, 60)
INK, PAPER = (34, 34, 34), (255, 255, 255)
TILE, GAP, HEADER = 224, 8, 30


def overlay(image: RGB, mask: UInt8[np.ndarray, "h w"], colour=PREDICTION) -> RGB:
    """Tint the pixels of a mask and draw its outline."""
    inside = (mask == 1).astype(np.uint8)
    result = image.copy()  # uint8 throughout: photographs may have 48 million pixels
    result[inside == 1] = result[inside == 1] // 2 + np.array(colour, np.uint8) // 2
    outlines, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(mask.shape) / 200))
    return cv2.drawContours(result, outlines, -1, colour, width)


def episode_figure(
    dataset: SegmentationDataset,
    episodes: Sequence[EpisodeIds],
    predictors: dict[str, Callable[[Episode], Float[Array, "1 s s"]]],
    side: int,
    resize: Resize = "pad",
) -> RGB:
    """Return a row an episode: support with mask, query, truth, each prediction.

    The IoU of a prediction stands in its corner.
    """
    rows = []
    for ids in episodes:
        query, label = dataset.image(ids.query), dataset.label(ids.query)
        truth = binary_mask(label, ids.class_id)
        first = ids.supports[0]
        shown = binary_mask(dataset.label(first), ids.class_id)
        tiles = [
            _tile(overlay(dataset.image(first), shown, SUPPORT)),
            _tile(query),
            _tile(overlay(query, truth, TRUTH)),
        ]
        loaded = load_episode(dataset, ids, side, resize=resize)
        episode = Episode(*(x[None] for x in loaded))
        for predict in predictors.values():
            margin = np.asarray(predict(episode))[0]
            height, width = truth.shape
            found = unpad(margin, height, width, resize) > 0
            *_, both, either = count_pixels(found, truth)
            picture = overlay(query, found.astype(np.uint8), PREDICTION)
            tiles.append(_tile(picture, f"IoU {100 * both / max(either, 1):.0f}"))
        rows.append((dataset.classes[ids.class_id - 1], tiles))
    return _sheet(("support", "query", "truth", *predictors), rows)


def _tile(image: RGB, note: str = "") -> Image.Image:
    """Fit a picture into a square, with a note in its corner."""
    picture = Image.fromarray(image)
    scale = TILE / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    tile = Image.new("RGB", (TILE, TILE), (240, 240, 240))
    tile.paste(picture, ((TILE - width) // 2, (TILE - height) // 2))
    if note:
        draw = ImageDraw.Draw(tile)
        font = ImageFont.load_default(16)
        box = draw.textbbox((6, 5), note, font=font)
        draw.rectangle((0, 0, box[2] + 6, box[3] + 5), fill=INK)
        draw.text((6, 5), note, PAPER, font=font)
    return tile


def _sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, list[Image.Image]]]
) -> RGB:
    """Arrange tiles under column titles, the row's class name on its left."""
    left, step = 100, TILE + GAP
    width = left + step * len(columns)
    sheet = Image.new("RGB", (width, HEADER + step * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for i, title in enumerate(columns):
        centre = (left + step * i + TILE // 2, HEADER // 2)
        draw.text(centre, title, INK, font=font, anchor="mm")
    for j, (name, tiles) in enumerate(rows):
        top = HEADER + step * j
        draw.text((left - 10, top + TILE // 2), name, INK, font=font, anchor="rm")
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (left + step * i, top))
    return np.asarray(sheet)
