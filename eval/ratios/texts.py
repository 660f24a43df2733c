"""The texts of the protocol, in two splits that share no file. They may quote each other:
:mod:`kvzip.eval.ratios.overlap` says how much.

Kinds of text that every Python has at hand, and texts of one's own. Which of a kind's items are for
training and which for testing, and in which order they come, is drawn from their names and a seed,
so that the same installation gives the same texts; a result has their hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import get_args

from kvzip.errors import UsageError
from kvzip.eval.results.ratios import Split
from kvzip.reading import text_in

SPLITS: tuple[Split, ...] = get_args(Split)
TEST_SHARE = 4
"""One item of so many is for testing."""
_MOST = 1 << 30
"""Bytes of a text that is read."""
_NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "turtledemo"}
_LICENCE = re.compile(r"(?i)^(licen[cs]e|copying|notice)")

Items = Iterator[tuple[str, str]]
"""Names and texts."""


@dataclass(frozen=True)
class Text:
    """One kind of text in its splits."""

    kind: str
    splits: dict[Split, str]

    @classmethod
    def of_files(cls, option: str) -> Text:
        """A text of one's own: NAME=TRAIN:TEST, two files of UTF-8. Raises UsageError for what is
        none."""
        name, equals, files = option.partition("=")
        train, colon, test = files.partition(":")
        if not (equals and colon and re.fullmatch(r"[\w.-]+", name)):
            raise UsageError(f"--text {option!r}: write NAME=TRAIN.txt:TEST.txt")
        if os.path.realpath(train) == os.path.realpath(test):
            raise UsageError(f"--text {option!r}: one file is in both splits")
        return cls(name, {"train": text_in(train, _MOST), "test": text_in(test, _MOST)})

    @classmethod
    def of_kind(cls, kind: str, seed: int, characters: int) -> Text:
        """A kind that is at hand, about `characters` characters of each split, or what there is.
        Raises UsageError when there is no such kind."""
        if kind not in KINDS:
            raise UsageError(f"no kind of text {kind!r}; there are: {', '.join(KINDS)}")
        items = {
            hashlib.sha256(f"{seed}/{kind}/{n}".encode()).digest(): t for n, t in KINDS[kind]()
        }
        found: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for digest in sorted(items):
            # The order is that of the first bytes, so the split is drawn from the last.
            split: Split = "train" if digest[-1] % TEST_SHARE else "test"
            if sum(map(len, found[split])) < characters:
                found[split].append(items[digest])
        return cls(kind, {split: "\n\n".join(texts) for split, texts in found.items()})


def _python_docs() -> Items:
    """The language reference that ships with Python, topic by topic."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _python_source() -> Items:
    """The sources of Python's library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if not _NOT_SOURCE & set(inner.parts):
            yield inner.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _package_metadata() -> Items:
    """What the installed packages say of themselves: most of it is their README."""
    for name, read in _installed():
        if found := read("METADATA"):
            yield name, found


def _licences() -> Items:
    """The licences of the installed packages. One stands for all that differ only in whom
    they name, or that are a part of it."""
    texts, kept = {}, dict[str, str]()
    for distribution in distributions():
        for file in distribution.files or []:
            if _LICENCE.match(file.name) and file.suffix in ("", ".txt", ".md", ".rst"):
                path = Path(str(file.locate()))
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="replace")
                    texts[f"{distribution.metadata['Name']}/{file}"] = text
    words = {name: _without_names(text) for name, text in sorted(texts.items())}
    for name, core in sorted(words.items(), key=lambda item: -len(item[1])):
        if not any(core in other for other in kept.values()):
            kept[name] = core
    yield from ((name, texts[name]) for name in sorted(kept))


def _without_names(licence: str) -> str:
    """A licence in lower case, without the lines that say whose copyright it is, and one blank
    between words."""
    lines = (line for line in licence.lower().splitlines() if "copyright" not in line)
    return " ".join(" ".join(lines).split())


def _installed() -> Iterator[tuple[str, Callable[[str], str | None]]]:
    """The names of the installed packages, and how their metadata are read."""
    found = {str(d.metadata["Name"]).lower(): d.read_text for d in distributions()}
    yield from sorted(found.items())


KINDS: dict[str, Callable[[], Items]] = {
    "python-docs": _python_docs,
    "python-source": _python_source,
    "package-metadata": _package_metadata,
    "licences": _licences,
}
"""Kinds of text that need nothing to be fetched."""


def texts(kinds: Sequence[str], own: Sequence[str], seed: int, characters: int) -> list[Text]:
    """All texts that were asked for. Raises UsageError when two have one name, or there is none."""
    found = [Text.of_kind(kind, seed, characters) for kind in kinds]
    found += [Text.of_files(option) for option in own]
    names = [text.kind for text in found]
    if not found:
        raise UsageError("name at least one text: --kinds, or --text NAME=TRAIN.txt:TEST.txt")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two texts are called {twice[0]!r}")
    return found
