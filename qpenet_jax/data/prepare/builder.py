"""The TFDS builder of every prepared data set: how its examples are written.

TFDS and ArrayRecord work without TensorFlow as long as images are given as bytes. The
same files make the same bytes, so that the hash of a data set can be published. A
data set appears under its name only when it is complete. One process at a time writes
it; what an interrupted one left is removed by the next, which starts again.
"""

import contextlib
import functools
import grp
import itertools
import json
import math
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import UInt8
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from qpenet_jax.core.errors import MAKE_ROOM, InputError
from qpenet_jax.core.files import check_room, locked
from qpenet_jax.data.images import check_label, encode_mask, read_image, warn_of_turn
from qpenet_jax.data.prepare.archives import Member
from qpenet_jax.data.sources.prepared import read_metadata
from qpenet_jax.data.versions import ContentHash

SHARD_BYTES = 256_000_000
"""About how many bytes of images go into a file; TFDS keeps as much in memory."""

DISK_SPARE = 1.1
"""Free disk needed per byte of images: masks and index take a few percent."""


@dataclass(frozen=True)
class Source:
    """What a data set is made of: `splits[split]` are the names of its `images`.

    `label` returns the label map of an image (0 background, 1..C, 255 ignore), and how
    messages name where it is from. The data set is written to `name/config/VERSION`.
    `facts` says how it came about (archives with their SHA-256, rules that were
    chosen); preparing again with other facts is refused rather than ignored.
    """

    name: str
    config: str
    classes: tuple[str, ...]
    splits: dict[str, Sequence[str]]
    images: dict[str, Member]
    label: Callable[[str], tuple[UInt8[np.ndarray, "h w"], str]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def image_bytes(self) -> int:
        """How many bytes all images take."""
        names = itertools.chain.from_iterable(self.splits.values())
        return sum(self.images[name].size for name in names)


def check_names(source: Source) -> None:
    """Refuses names that can't stand in one data set.

    Raises:
        InputError: a split without images; a name twice, in one split or in two; one
            that isn't Unicode.
    """
    split_of: dict[str, str] = {}
    for split, names in source.splits.items():
        if not names:
            raise InputError(f"split {split!r} has no image: list some for it")
        for name in names:
            if name in split_of:
                raise InputError(
                    f"image {name} is listed for {split_of[name]} and for {split}: "
                    "what is trained on can't be scored; keep one"
                )
            if name != name.encode(errors="ignore").decode():
                raise InputError(f"image {name!r}: rename it, its name isn't Unicode")
            split_of[name] = split


def check_user(user: int, group: int) -> None:
    """Refuses ids without a name: TFDS asks for the name of every file's owner.

    Raises:
        InputError: the system knows no such user or group.
    """
    try:
        pwd.getpwuid(user)
        grp.getgrgid(group)
    except KeyError:
        raise InputError(
            f"this process' user (id {user}) or group (id {group}) has no name, which "
            "TFDS needs: add a line to /etc/passwd and /etc/group, or run as a named "
            "user"
        ) from None


class SegmentationBuilder(ShardBasedBuilder, skip_registration=True):
    """Writes a `Source`.

    Shards are written in the source's order, one after the other. TFDS's other kind
    of builder sorts examples, and from 1 GB on needs TensorFlow for that.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Source, out: Path):
        # pyright takes `name` for a name of the class alone.
        self.name = source.name  # pyright: ignore[reportAttributeAccessIssue]
        self.source = source
        self.index: dict[str, dict[str, Any]] = {}  # filled as examples are written
        config = tfds.core.BuilderConfig(name=source.config, version=self.VERSION)
        super().__init__(file_format="array_record", data_dir=str(out), config=config)

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
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images and label maps, made by `qpenet prepare`.",
            features=features,
            metadata=tfds.core.MetadataDict(
                classes=list(self.source.classes),
                facts=self.source.facts,
                index=self.index,
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator]]]:
        del dl_manager
        return {split: self._shards(split) for split in self.source.splits}

    def _shards(self, split: str) -> list[Callable[[], Iterator]]:
        """Returns a function for each shard that yields its part of the examples."""
        examples = self._examples(split)
        images = sum(map(len, self.source.splits.values()))
        size = max(1, images * SHARD_BYTES // max(1, self.source.image_bytes))
        shards = math.ceil(len(self.source.splits[split]) / size)
        return [functools.partial(itertools.islice, examples, size)] * shards

    def _examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        index = self.index[split] = {"names": [], "counts": []}
        content, images = ContentHash(), self.source.images
        names = tqdm(self.source.splits[split], desc=f"writing {split}", unit="image")
        for position, name in enumerate(names):
            member, (label, label_from) = images[name], self.source.label(name)
            photo, where = member.read(), str(member)
            size = read_image(BytesIO(photo), name=where).shape[:2]
            warn_of_turn(BytesIO(photo), name=where)
            counts = check_label(label, size, len(self.source.classes), label_from)
            content.add(name, photo, label)
            shown = np.flatnonzero(counts)
            index["names"].append(name)
            index["counts"].append([[int(c) + 1, int(counts[c])] for c in shown])
            index |= {"photos": content.photos, "sha256": content.hexdigest()}
            if position == len(names) - 1 and not any(index["counts"]):
                raise InputError(
                    f"no mask of {split} shows a class; data/README.md says what the "
                    "values of a mask mean"
                )
            image, mask = BytesIO(photo), BytesIO(encode_mask(label))
            features = {"name": name, "image": image, "mask": mask, "counts": counts}
            yield position, features

    def _example_writer(self) -> ExampleWriter:
        return _SameBytes(tfds.core.FileFormat.ARRAY_RECORD)


class _SameBytes(ExampleWriter):
    """Writes the features of an example in a fixed order; protobuf's has none."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes a shard.

        Raises:
            InputError: the disk is full, for which ArrayRecord raises a RuntimeError.
        """
        kinds: Any = tf_example_pb2  # made when it is imported, so pyright knows none
        parsed = ((key, kinds.Example.FromString(data)) for key, data in examples)
        ordered = ((key, x.SerializeToString(deterministic=True)) for key, x in parsed)
        try:
            return super().write(path, ordered)
        except RuntimeError as error:
            reason = str(error).partition(";")[0]
            raise InputError(
                f"{path}: can't be written ({reason}); {MAKE_ROOM}"
            ) from error


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from printing, and from warning that a configuration isn't its own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.set_verbosity(verbosity)


@_quiet_tfds()
def prepare(source: Source, out: Path) -> Path:
    """Writes the data set below `out` and returns its folder.

    A finished one is kept, and that is printed to the standard error, if its facts and
    all it holds are those of the source.

    Raises:
        InputError: a finished one was made in another way or of other files; another
            process is writing it; no class in a split; too little free disk; an image
            is broken, or its label can't be used; or as `check_user`, `check_names`.
    """
    check_user(os.geteuid(), os.getegid())
    check_names(source)
    builder = SegmentationBuilder(source, out)
    folder = Path(builder.data_dir)
    if not folder.is_dir():
        needed = int(DISK_SPARE * source.image_bytes)
        check_room(out, needed, "make room or choose another --out")
    busy = (
        f"{folder}: another process is preparing this data set; wait until it has "
        "finished, or choose another --out"
    )
    # Beside the folder of the versions, which holds data sets alone.
    with locked(folder.parent.with_name(f".{source.config}.lock"), busy):
        if folder.is_dir():
            _check_same(folder, source)
            print(f"{folder} is kept: it holds exactly these files", file=sys.stderr)
            return folder
        # This process has the lock, so whoever began these is gone. TFDS named them.
        for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
            shutil.rmtree(left)
        # TFDS makes a folder for downloads in any case.
        with tempfile.TemporaryDirectory() as unused:
            builder.download_and_prepare(download_dir=unused)
    return folder


def _check_same(folder: Path, source: Source) -> None:
    """Refuses a finished data set that isn't what the source would make.

    Raises:
        InputError: naming a fact, a split or an image that differs.
    """
    made = read_metadata(folder)
    facts, given = made["facts"], json.loads(json.dumps(source.facts))
    changed = sorted(k for k in facts | given if facts.get(k) != given.get(k))
    if made["index"].keys() != source.splits.keys():
        changed.append("splits")
    if changed:
        raise InputError(
            f"{folder} was made in another way ({', '.join(changed)} differ): remove "
            "it, or choose another --out"
        )
    for split, names in source.splits.items():
        content = ContentHash()
        for name in tqdm(names, desc=f"comparing {split}", unit="image"):
            content.add(name, source.images[name].read(), source.label(name)[0])
        old = made["index"][split]
        if content.hexdigest() != old["sha256"]:
            photos = dict(zip(old["names"], old["photos"], strict=True))
            now = zip(names, content.photos, strict=True)
            new = [f"image {name}" for name, photo in now if photos.get(name) != photo]
            raise InputError(
                f"{folder} was made of other files ({[*new, 'a mask or the list'][0]} "
                f"of {split} differs): remove it, or choose another --out"
            )
