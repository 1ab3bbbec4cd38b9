"""The commands that the documents show are ones that the program takes."""

import contextlib
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest

from qpenet_jax.cli.main import parse
from qpenet_jax.config import default_config, flat

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *ROOT.glob("docs/**/*.md")]
BLOCK = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRAIN = ("python", "train.py")
FIELDS = set(flat(default_config().to_dict()))


def commands(page):
    """Return the words of each `qpenet` and `train.py` command in a page's blocks.

    Those with a variable of the shell are left out: its value isn't known.
    """
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
            lexer.whitespace_split = True
            parts = itertools.groupby(lexer, lambda word: word in ("&&", ";"))
            for words in (list(part) for ends, part in parts if not ends):
                if any("$" in word for word in words):
                    continue
                if words[0] == "qpenet":
                    yield words[1:]
                elif tuple(words[:2]) == TRAIN:
                    yield ["train", *words[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documents_are_taken(page):
    for words in commands(page):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                args = parse(words)
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: {errors.getvalue()}")
        for word in args.overrides:
            field = word.lstrip("-").partition("=")[0].removeprefix("config.")
            assert field in FIELDS, f"{' '.join(words)}: no field {field}"
        config = getattr(args, "config", None)
        if config and str(config).startswith(("configs/", "docs/")):
            assert (ROOT / config).is_file(), f"{' '.join(words)}: no {config}"
