"""The TFDS builder of every prepared data set: what an example keeps, how written.

TFDS and ArrayRecord work without TensorFlow as long as images are given as bytes. A
data set appears under its name only when it is complete. One process at a time writes
it; what an interrupted one left is removed by the next, which starts again.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int, UInt8
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder
from tqdm import tqdm

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.files import check_room, locked
from qpenet_jax.core.runtime import nameless_users
from qpenet_jax.data.images import check_label, read_image, warn_of_turn

SHARD_BYTES = 256_000_000
"""About how many bytes of images go into a file; TFDS keeps as much in memory."""

DISK_SPARE = 1.1
"""Free disk needed per byte of images: masks and index take a few percent."""


class Example(NamedTuple):
    """One image as it came, and its label map: 0 background, 1..C, 255 ignore.

    Messages name the image by `image_from` and the label by `label_from`, say
    "archive: member", or by `name`.
    """

    name: str
    image: bytes
    label: UInt8[np.ndarray, "h w"]
    image_from: str = ""
    label_from: str = ""


@dataclass(frozen=True)
class Source:
    """What a data set is made of: `splits[split]` are names, `example` loads one.

    `facts` says how it came about (archives with their SHA-256, rules that were
    chosen); preparing again with other facts is refused rather than ignored.
    """

    classes: tuple[str, ...]
    splits: dict[str, Sequence[str]]
    example: Callable[[str, str], Example]  # (split, name) -> Example
    image_bytes: int
    """About how many bytes all images take, for the check of the disk."""
    facts: dict[str, Any] = field(default_factory=dict)


class SegmentationBuilder(ShardBasedBuilder, skip_registration=True):
    """Writes a `Source`; subclasses give `name`, `VERSION` and where it comes from.

    Shards are written in the source's order, one after the other. TFDS's other kind
    of builder sorts examples, and from 1 GB on needs TensorFlow for that.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Source, **arguments: Any):
        self.source = source
        self.index: dict[str, dict[str, list]] = {}  # filled as examples are written
        super().__init__(file_format="array_record", **arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "name": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3)),
                "mask": tfds.features.Image(shape=(None, None, 1)),
                "counts": tfds.features.Tensor(
                    shape=(len(self.source.classes),), dtype=np.int64
                ),
            }
        )
        metadata = {
            "classes": list(self.source.classes),
            "facts": self.source.facts,
            "index": self.index,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features,
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator]]]:
        del dl_manager
        return {split: self._shards(split) for split in self.source.splits}

    def _shards(self, split: str) -> list[Callable[[], Iterator]]:
        """Return a function for each shard that yields its part of the examples."""
        examples = self._examples(split)
        images = sum(map(len, self.source.splits.values()))
        size = max(1, images * SHARD_BYTES // max(1, self.source.image_bytes))
        shards = math.ceil(len(self.source.splits[split]) / size)
        return [functools.partial(itertools.islice, examples, size)] * shards

    def _examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        names = self.source.splits[split]
        index = self.index[split] = {"names": [], "counts": []}
        bar = tqdm(names, desc=f"writing {split}", unit="image")
        for position, name in enumerate(bar):
            example = self.source.example(split, name)
            counts = check_example(example, len(self.source.classes))
            index["names"].append(example.name)
            shown = np.flatnonzero(counts)
            index["counts"].append([[int(c) + 1, int(counts[c])] for c in shown])
            yield (
                position,
                {
                    "name": example.name,
                    "image": BytesIO(example.image),
                    "mask": BytesIO(encode_mask(example.label)),
                    "counts": counts,
                },
            )


def check_example(example: Example, classes: int) -> Int[np.ndarray, " classes"]:
    """Decode the image once and return the pixels of each class in its label.

    Raises:
        InputError: the image is broken, has another size than the label, or the label
            holds a value that is no class.
    """
    image_from = example.image_from or example.name
    height, width = read_image(BytesIO(example.image), name=image_from).shape[:2]
    warn_of_turn(BytesIO(example.image), name=image_from)
    label_from = example.label_from or example.name
    return check_label(example.label, (height, width), classes, label_from)


def encode_mask(label: UInt8[np.ndarray, "h w"]) -> bytes:
    """Return a grey PNG: no palette for a reader to stumble over."""
    # The default is tuned for photos: this halves the time to decode a label map.
    strategy = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)
    return cv2.imencode(".png", label, strategy)[1].tobytes()


def prepare(
    builder: type[SegmentationBuilder], source: Source, out: Path, config: str
) -> Path:
    """Write the data set below `out` and return its folder; a finished one is kept.

    Raises:
        InputError: a finished one was made in another way; another process is writing
            it; a split without images or with a name twice; too little free disk; an
            example that can't be used.
    """
    _check_names(source)
    with _quiet_tfds():
        made = builder(
            source=source,
            data_dir=str(out),
            config=tfds.core.BuilderConfig(name=config, version=builder.VERSION),
        )
    folder = Path(made.data_dir)
    if not folder.is_dir():
        needed = int(DISK_SPARE * source.image_bytes)
        check_room(out, needed, "make room or choose another --out")
        busy = (
            f"{folder}: another process is preparing this data set; wait until it has "
            "finished, or choose another --out"
        )
        # Beside the folder of the versions, which holds data sets alone.
        with locked(folder.parent.with_name(f".{config}.lock"), busy):
            _write(made, folder)
    _check_same(folder, source)
    return folder


def _write(made: SegmentationBuilder, folder: Path) -> None:
    """Write a data set whose lock this process holds."""
    if folder.is_dir():  # Another process has finished it in the meantime.
        return
    # The lock was free: whoever began these is gone. The name is TFDS's own.
    for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
        shutil.rmtree(left)
    # TFDS makes a folder for downloads in any case.
    with tempfile.TemporaryDirectory() as unused, _quiet_tfds():
        made.download_and_prepare(download_dir=unused)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keep TFDS from printing, and from warning that a configuration isn't its own.

    Users without a name may write as well.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), nameless_users():
            yield
    finally:
        logging.set_verbosity(verbosity)


def _check_names(source: Source) -> None:
    for split, names in source.splits.items():
        if not names:
            raise InputError(f"split {split!r} has no image; check the lists of images")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise InputError(
                f"split {split!r} lists image {name} {times} times; keep one"
            )


def _check_same(folder: Path, source: Source) -> None:
    facts = json.loads((folder / "metadata.json").read_text())["facts"]
    ours = json.loads(json.dumps(source.facts))
    changed = sorted(k for k in facts | ours if facts.get(k) != ours.get(k))
    if changed:
        raise InputError(
            f"{folder} was made in another way ({', '.join(changed)} differ): remove "
            "it, or choose another --out"
        )
