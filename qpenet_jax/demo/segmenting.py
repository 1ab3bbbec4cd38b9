"""Segments marked photos for the page's buttons; nothing here needs a page.

Nothing is kept between calls: all that a visitor has done comes with each of them, so
that visitors can't get in each other's way. Files are those that the server stored.
"""

import dataclasses
import itertools
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image

from qpenet_jax.core.errors import InputError
from qpenet_jax.data.sources.shapes import Shapes
from qpenet_jax.demo.intermediates import intermediate_pictures
from qpenet_jax.demo.photos import (
    EditorValue,
    Picture,
    SupportPhoto,
    add_object,
    check_number,
    editor_value,
    read_marks,
    read_photo,
    shrunk,
    supports_of,
)
from qpenet_jax.evaluation.pictures import (
    PREDICTION,
    RGB,
    SUPPORT,
    class_overlay,
    overlay,
)
from qpenet_jax.masks.annotations import UNNAMED
from qpenet_jax.masks.queries import Frame, Query
from qpenet_jax.masks.tasks import Segmentation
from qpenet_jax.masks.writers import COCO, SUMMARY, MaskWriter
from qpenet_jax.paper.sheets import DARK, heat
from qpenet_jax.segmenter import Segmenter

MOST_QUERIES = 50

LONGEST_LABEL = 60

ENDINGS = ("", "_probability", "_overlay")
"""What stands behind the name of a photo in those of its results."""

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

    masks: list[Picture]
    probabilities: list[Picture]
    inside: list[Picture]
    marked: list[Picture]


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
    shown = Answer([], [], [], [_marked(support) for support in supports])
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


def result_names(files: Sequence[Path]) -> list[Path]:
    """Returns what the results of files are called: their names, different ones.

    Telephones call all photos alike; a number is put behind the name then. No result
    is called as the files about all photos, also where a system ignores case.
    """
    taken, names = {about.stem for about in (SUMMARY, *COCO.values())}, []
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in itertools.count(2))
        for name in itertools.chain([file.stem], numbered):
            results = {f"{name}{end}".casefold() for end in ENDINGS}
            if not taken & results:
                break
        taken |= results
        names.append(Path(name))
    return names


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


CHOSEN = ("hexagon", "disc", "star")
"""Of the shapes that the first images show often enough, those that features of
EfficientNet-Lite0 find best without training; most others they find worse."""

EXAMPLE_SIDE, EXAMPLE_IMAGES = 321, 60

EXAMPLE_SUPPORTS, EXAMPLE_QUERIES = 3, 4

LEAST = 0.05
"""Share of its picture that a shape covers."""


def write_example(
    name: str, folder: Path
) -> tuple[list[Path], list[dict[str, Any]], list[Path]]:
    """Writes an example's pictures of shapes into a folder, drawn on the spot.

    Returns pictures in which the shape `name`, one of `CHOSEN`, is to be marked, their
    editors' values with it marked, and pictures to segment: the first in which it is
    large enough, none is left out.
    """
    source, least = Shapes("val", EXAMPLE_IMAGES, EXAMPLE_SIDE), LEAST * EXAMPLE_SIDE**2
    class_id = source.classes.index(name) + 1
    masks = {i: source.label(i) == class_id for i in range(EXAMPLE_IMAGES)}
    shown = [i for i, mask in masks.items() if mask.sum() >= least]
    files = []
    for i in shown[: EXAMPLE_SUPPORTS + EXAMPLE_QUERIES]:
        files.append(folder / f"{source.names[i]}.png")
        PIL.Image.fromarray(source.image(i)).save(files[-1])
    supports, queries = files[:EXAMPLE_SUPPORTS], files[EXAMPLE_SUPPORTS:]
    values = list(map(editor_value, supports, (masks[i] for i in shown)))
    return supports, values, queries


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

    def show_marks(
        self, files: Files, before: Files, *values: EditorValue
    ) -> list[dict[str, Any]]:
        """Returns the editors' values for these files; marks stay with their file.

        `before` are the files that the editors showed, and `values` theirs.
        """
        check_number(_paths(files))
        known = dict(zip(before or (), map(read_marks, values), strict=False))
        return [editor_value(file, known.get(str(file))) for file in _paths(files)]

    def find_object(
        self, number: int, files: Files, value: EditorValue
    ) -> dict[str, Any]:
        """Returns an editor's value with the painted object marked up to its edges."""
        return add_object(_paths(files)[number], value)

    def show_queries(self, files: Files) -> list[Picture]:
        """Returns small pictures of photos to segment."""
        return [
            Picture(shrunk(read_photo(file), THUMBNAIL), file.name)
            for file in _paths(files)
        ]

    def show_example(
        self, name: str
    ) -> tuple[list[str], list[dict[str, Any]], list[str], list[Picture], str]:
        """Returns supports, editors, queries, their small pictures and the label."""
        supports, values, queries = write_example(name, self._new_folder())
        files, others = (list(map(str, paths)) for paths in (supports, queries))
        return files, values, others, self.show_queries(others), name

    def segment(
        self,
        files: Files,
        values: Sequence[EditorValue],
        queries: Files,
        label: str,
        refine: bool,
        bar: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> tuple[str, list[Picture], list[Picture], list[Picture], list[Picture]]:
        """Returns the zip's path, masks, probabilities, intermediates and marks."""
        archive = self._new_folder() / "masks.zip"
        shown = answer(
            self.segmenter,
            supports_of(_paths(files), values),
            _paths(queries),
            archive,
            about=self.about,
            label=label,
            refine=refine,
            look=self.trained,
            bar=bar,
        )
        return str(archive), *shown

    def _new_folder(self) -> Path:
        """Returns a folder whose name nobody can guess."""
        folder = self.cache / secrets.token_hex(16)
        folder.mkdir()
        return folder


def _paths(files: Files) -> list[Path]:
    return [Path(file) for file in files or ()]
