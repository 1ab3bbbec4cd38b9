"""Segments marked photos for the page's buttons; nothing here needs a page.

Nothing is kept between calls: all that a visitor has done comes with each of them, so
that visitors can't get in each other's way. Files are those that the server stored.
"""

import dataclasses
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from qpenet_jax.core.errors import InputError
from qpenet_jax.demo.examples import write_example
from qpenet_jax.demo.intermediates import intermediate_pictures
from qpenet_jax.demo.marks import (
    SupportPhoto,
    add_object,
    canvases,
    read_marks,
    supports_of,
)
from qpenet_jax.demo.photos import (
    RGB,
    Picture,
    read_photo,
    result_names,
    shrunk,
)
from qpenet_jax.evaluation.pictures import PREDICTION, SUPPORT, class_overlay, overlay
from qpenet_jax.masks.annotations import UNNAMED
from qpenet_jax.masks.queries import Frame, Query
from qpenet_jax.masks.tasks import Segmentation
from qpenet_jax.masks.writers import MaskWriter
from qpenet_jax.paper.sheets import DARK, heat
from qpenet_jax.segmenter import Segmenter

MOST_QUERIES = 50

LONGEST_LABEL = 60

FORMATS = ("png", "coco", "coco_polygons", "labelme")

SHOWN = 1024
"""The longest side of a picture on the page; the zip holds masks of the full size."""

MOST_INTERMEDIATES = 3
"""Queries whose intermediates are shown."""


class Answer(NamedTuple):
    """What the page shows: for each query its mask and how probable it is.

    `marked` are the supports as they were taken, `inside` is what
    `intermediate_pictures` returns for the first queries, each below its file's name.
    """

    marked: list[Picture]
    masks: list[Picture]
    probabilities: list[Picture]
    inside: list[Picture]


def answer(
    segmenter: Segmenter,
    supports: Sequence[SupportPhoto],
    files: Sequence[Path],
    archive: Path,
    *,
    about: Mapping[str, Any],
    label: str = "",
    refine: bool = False,
    look: bool = False,
    bar: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Answer:
    """Segments files and writes all results into the zip `archive`.

    It holds what `qpenet predict --probability` writes in `FORMATS`, for photos that
    lie beside the results. `about` stands in its summary; `label` is what the object is
    called in files; `look` at the intermediates needs a trained network; `bar` may show
    how far it is. One query at a time is in memory.

    Raises:
        InputError: no file or too many, a broken one, or a label for no file.
    """
    if not 1 <= len(files) <= MOST_QUERIES:
        raise InputError(
            f"{len(files) or 'no'} photos to segment: add 1 to {MOST_QUERIES}; for "
            "more, qpenet predict takes folders"
        )
    name = checked_label(label)
    tasks = segmenter.learn_classes(
        {name: ([s.pixels for s in supports], [s.mask for s in supports])}
    )
    shown = Answer([_marked(support) for support in supports], [], [], [])
    names = result_names(files)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        results = MaskWriter(
            out, (name,), FORMATS, probabilities=True, about=dict(about), photos=out
        )
        for i in bar(range(len(files))):
            pixels = read_photo(files[i])
            found = tasks.find(pixels, refine=refine, probabilities=True)
            photo = names[i].with_name(f"{names[i]}{files[i].suffix}")
            results.add(Query(photo, names[i], photo), Frame(pixels, names[i]), found)
            _show(shown, photo.name, pixels, found)
            if look and i < MOST_INTERMEDIATES:
                seen = tasks.tasks[name].intermediates(pixels)
                drawn = intermediate_pictures(pixels, supports, seen, segmenter.side)
                shown.inside.extend(
                    Picture(part.pixels, f"{photo.name}: {part.caption}")
                    for part in drawn
                )
        results.finish()
        shutil.make_archive(str(archive.with_suffix("")), "zip", out)
    return shown


def checked_label(label: str) -> str:
    """Returns what the object is called in files.

    Raises:
        InputError: signs that can't be printed, or too many.
    """
    name = label.strip() or UNNAMED
    if len(name) > LONGEST_LABEL or not name.isprintable():
        raise InputError(
            f"a name of {len(name)} signs: give up to {LONGEST_LABEL} on one line"
        )
    return name


def _marked(support: SupportPhoto) -> Picture:
    picture = shrunk(overlay(support.pixels, support.mask, SUPPORT), SHOWN)
    return Picture(picture, f"{support.name}: {_percent(support.mask == 1)}")


def _show(shown: Answer, name: str, pixels: RGB, found: Segmentation) -> None:
    """Adds what was found in a query."""
    (score,), (probable,) = found.scores, found.probabilities
    share = _percent(found.index == 1)
    result = "nothing found" if score is None else f"{share}, score {score:.2f}"
    picture = shrunk(class_overlay(pixels, found.index, 1), SHOWN)
    shown.masks.append(Picture(picture, f"{name}: {result}"))
    below = shrunk(pixels, SHOWN)
    size = below.shape[1], below.shape[0]
    small = cv2.resize(probable, size, interpolation=cv2.INTER_AREA)
    highest = f"{name}: at most {100 * float(probable.max()):.0f} %"
    shown.probabilities.append(Picture(heat(small, DARK * below, PREDICTION), highest))


def _percent(where) -> str:
    share = 100 * float(np.mean(where))
    return (
        f"{share:.0f} % of the photo" if share >= 1 else f"{share:.1f} % of the photo"
    )


THUMBNAIL = 320

Files = Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of a page about one segmenter, whose files go into the folder `cache`.

    `about` is what summaries say of it. All raise InputError, which the page shows.
    """

    segmenter: Segmenter
    about: Mapping[str, Any]
    cache: Path

    @property
    def trained(self) -> bool:
        """Whether there is a network with parts to look into."""
        return self.about["method"] != "prototype"

    def show_marks(self, files: Files, text: str | None) -> str:
        """Returns the value of the board for these files; strokes of others go."""
        return canvases(_paths(files), read_marks(text))

    def find_object(self, files: Files, text: str | None) -> str:
        """Returns the value of the board with the clicked object marked."""
        return add_object(_paths(files), text)

    def show_queries(self, files: Files) -> list[Picture]:
        """Returns small pictures of photos to segment."""
        return [
            Picture(shrunk(read_photo(file), THUMBNAIL), file.name)
            for file in _paths(files)
        ]

    def show_example(
        self, name: str
    ) -> tuple[list[str], str, list[str], list[Picture], str]:
        """Returns supports, board, queries, their small pictures and the label."""
        made = write_example(name, self._new_folder())
        marks = dict(zip(map(str, made.supports), made.masks, strict=True))
        files, queries = (list(map(str, x)) for x in (made.supports, made.queries))
        text = canvases(made.supports, marks)
        return files, text, queries, self.show_queries(queries), name

    def segment(
        self,
        files: Files,
        text: str | None,
        queries: Files,
        label: str,
        refine: bool,
        bar: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> tuple[str, list[Picture], list[Picture], list[Picture], list[Picture]]:
        """Returns the zip's path, masks, probabilities, intermediates and marks."""
        archive = self._new_folder() / "masks.zip"
        shown = answer(
            self.segmenter,
            supports_of(_paths(files), text),
            _paths(queries),
            archive,
            about=self.about,
            label=label,
            refine=refine,
            look=self.trained,
            bar=bar,
        )
        return (
            str(archive),
            shown.masks,
            shown.probabilities,
            shown.inside,
            shown.marked,
        )

    def _new_folder(self) -> Path:
        """Returns a folder whose name nobody can guess."""
        folder = self.cache / secrets.token_hex(16)
        folder.mkdir()
        return folder


def _paths(files: Files) -> list[Path]:
    return [Path(file) for file in files or ()]
