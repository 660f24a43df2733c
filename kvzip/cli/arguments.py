"""Kinds of arguments that several commands take, and how they are read."""

from __future__ import annotations

import errno
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kvzip import tensors
from kvzip.cli.terminal import complain
from kvzip.container import MAGIC
from kvzip.container.sealed import Key, is_sealed
from kvzip.container.secret_keys import key_in_file
from kvzip.errors import KVZipError, UsageError
from kvzip.files import STDIN, STDOUT, check_output, is_standard_output, name_of
from kvzip.load import llama_cpp
from kvzip.load.llama_cpp import is_slot
from kvzip.profile import Profile
from kvzip.reading import reading
from kvzip.snapshot import Snapshot
from kvzip.tensors import TensorFile

Json = Annotated[bool, Parameter(name="--json", negative=(), help="One JSON object on stdout.")]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
KvzFile = Annotated[str, Parameter(help="A .kvz file: a path, a URL, or - for stdin.")]
KvzFiles = Annotated[list[str], Parameter(help=".kvz files: paths, URLs, or - for stdin.")]
OutFolder = Annotated[Path, Parameter(name=["--out", "--output", "-o"])]
ResultFile = Annotated[Path | None, Parameter(name=["--output", "-o", "--out"])]
Texts = Annotated[list[str] | None, Parameter(consume_multiple=True)]
Threads = Annotated[int, Parameter(help="0: all cores.")]
NativeBf16 = Annotated[
    bool,
    Parameter(
        name="--native-bf16",
        negative=(),
        help="Leave bf16 products to torch where the processor has none; by default they are made "
        "in fp32 and rounded, five times as fast.",
    ),
]
ProfilePath = Annotated[
    Path | None,
    Parameter(name="--profile", help="A .kvprofile, for its own codec."),
]
KeyFile = Annotated[
    Path | None,
    Parameter(
        name="--key-file",
        help="The key of sealed files and stores (AES-256-GCM): a file of 32 random bytes or 64 "
        "hexadecimal digits.",
    ),
]
PriceFiles = Annotated[
    list[Path] | None,
    Parameter(name="--price-file", help="TOML over the library's price book; may be repeated."),
]

Decode = Annotated[
    Literal["host", "device"],
    Parameter(
        help="Where: on cores of the host, or, those codecs that have a rate there, the GPU."
    ),
]
GpuFile = Annotated[
    Path | None,
    Parameter(
        help="What make bench-gpu measured, in place of the price book's GPU decoders, PCIe."
    ),
]

OUTPUTS = ("-o", "--output", "--out", "--picture", "--page")
"""Options that name a file to write."""


def with_streams(arguments: Sequence[str]) -> list[str]:
    """What was typed, with the standard streams in place of every ``-`` that names a file."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if argument == "-":
            writes = i > 0 and arguments[i - 1] in OUTPUTS
            found.append(str(STDOUT if writes else STDIN))
        elif equals and value == "-" and option.startswith("--"):
            found.append(f"{option}={STDOUT if option in OUTPUTS else STDIN}")
        else:
            found.append(argument)
    return found


WRITES = {
    "encode": ["a .kvz file"],
    "decode": ["a snapshot", "a saved session"],
    "fit": ["a profile"],
}
WRITES["get"] = [*WRITES["encode"], "a snapshot", *WRITES["fit"]]
"""What commands write of what took long to make; all others write results."""


def refuse_overwriting(command: str, bound: inspect.BoundArguments) -> None:
    """Raise UsageError if a file that a command is to write is one that it reads, or of a kind that
    it does not write: `-o *.safetensors` gives the first of many to the option."""
    outputs, inputs = [], []
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        for given in value if isinstance(value, (list, tuple)) else [value]:
            if name in ("output", "out", "picture", "page"):
                outputs += [given] if isinstance(given, Path) else []
            elif isinstance(given, Path) or parameter.kind is not parameter.KEYWORD_ONLY:
                inputs += [given] if isinstance(given, (Path, str)) else []
    for output in outputs:
        check_output(output, inputs)
        kind = kind_of(output)
        if kind is not None and kind not in WRITES.get(command, []):
            raise UsageError(f"{output} is {kind}: remove it first, if {command} is to replace it")


def kind_of(path: Path) -> str | None:
    """What a file is that took long to make; None for any other, or if there is none."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            first = file.read(len(MAGIC))
        if first == MAGIC or is_sealed(first):
            return "a .kvz file"
        if is_slot(first):
            return "a saved session"
        found = TensorFile(path).metadata
    except (KVZipError, OSError):
        return None
    return "a snapshot" if "kvzip" in found else "a profile" if "kvprofile" in found else None


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command is to answer in JSON, as far as what was typed tells where it cannot be
    read: `--json`, alone or with a value that means yes."""
    yes = [f"--json={word}" for word in ("true", "yes", "1", "t", "y")]
    return any(word == "--json" or word.lower() in yes for word in arguments)


def writes_stdout(arguments: Sequence[str]) -> bool:
    """Whether a file that a command writes is standard output, by whatever name."""
    return any(map(is_standard_output, _outputs(arguments)))


def refuse_closed_input(arguments: Sequence[str]) -> None:
    """Raise OSError if a command is to read a stdin that is closed: in its place there may be
    whatever was opened since."""
    if sys.stdin is None and str(STDIN) in {word.rpartition("=")[2] for word in arguments}:
        raise OSError(errno.EBADF, "it is closed", "standard input")


def refuse_folders(command: str, arguments: Sequence[str]) -> None:
    """Raise UsageError if a command that writes a file is told a folder, by a slash at the end:
    a Path would not have it any more."""
    for output in _outputs(arguments):
        if command in WRITES and output.endswith("/"):
            raise UsageError(f"{output} names a folder: name the file that {command} is to write")


def _outputs(arguments: Sequence[str]) -> list[str]:
    """The names of what a command writes, as they were typed."""
    found = [after for option, after in pairwise(arguments) if option in OUTPUTS]
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option in OUTPUTS:
            found.append(value)
        elif argument.startswith("-o"):
            found.append(argument.removeprefix("-o"))
    return found


def refuse_twice(documents: Sequence[Path]) -> None:
    """Raise UsageError for a document that is given twice: it would count twice, and a result knows
    its documents by their files."""
    for i, document in enumerate(documents):
        if document in documents[:i]:
            raise UsageError(f"{document} is given twice")


def check_folders(*outputs: Path | None) -> None:
    """Raise UsageError if a file is to be written where there is no folder: before the minutes or
    hours of measuring what is to be in it."""
    for output in outputs:
        if output is not None and not output.parent.is_dir():
            raise UsageError(f"{output.parent} is not a folder")


def command_line() -> str:
    """What was typed, for results that say how they were made."""
    return shlex.join(["kvzip", *sys.argv[1:]])


def choose_products(native_bf16: bool) -> None:
    """Apply --native-bf16 to all models that this process and its children load."""
    if native_bf16:
        os.environ["KVZIP_NATIVE_BF16"] = "1"


def load_snapshot(path: Path) -> Snapshot:
    """What is to be encoded: a snapshot, or a saved session of llama.cpp's."""
    name = name_of(path)
    file = reading(name, partial(_length, name))  # stays open: parts are read when they are used
    first = file.read(4)
    file.seek(0)
    if not is_slot(first):
        return Snapshot.of_file(TensorFile(name, file=file))
    return llama_cpp.load_slot(file)


def _length(name: str, first: bytearray) -> int | None:
    """How long a snapshot is that begins so; None if it takes more bytes to tell. A saved session
    does not say it."""
    if len(first) < 4:
        return None
    return 1 << 62 if is_slot(first) else tensors.whole_length(name, first)


def codec_for(named: str | None, profile: Profile | None) -> str:
    """The codec that encodes: the one that is named, or that of the profile, or `channel`."""
    if named is None:
        return "channel" if profile is None else profile.codec
    if profile is not None and not named.startswith("auto"):
        from kvzip.codec import get_codec, profile_for

        if profile_for(get_codec(named), profile) is None:
            complain(
                f"--codec {named} uses no profile of {profile.codec}: files are written without it"
            )
    return named


def read_profile(path: Path | None) -> Profile | None:
    """The profile in a file, if there is a file. Raises KVZipError and OSError."""
    return None if path is None else Profile.load(path)


def read_key(path: Path | None) -> Key | None:
    """The key in a file. Raises UsageError, which does not show it, and OSError."""
    return None if path is None else key_in_file(path)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name for name in text.split(",") if name)


def integers(option: str, text: str, least: int = 1) -> list[int]:
    """Numbers with commas between."""
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write numbers with commas between") from None
    if min(found) < least:
        raise UsageError(f"{option} {text!r}: all must be at least {least}")
    return found


def numbers(option: str, text: str) -> list[float]:
    """Numbers above zero with commas between; UsageError that names the option for all else."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < 2**62 for number in found):
        raise UsageError(f"{option} is {text!r}: it must be numbers above zero, commas between")
    return found


def document_range(text: str) -> slice:
    """A:B, A:, :B, or one number."""
    first, colon, last = text.partition(":")
    try:
        start = int(first) if first or not colon else None
        stop = int(last) if last else None
    except ValueError:
        raise UsageError(f"--docs {text!r}: write A:B, A:, :B or a number") from None
    if start is not None and not colon:
        return slice(start, start + 1 or None)  # -1, the last one, ends where all do
    if stop == 0 or (
        start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop
    ):
        raise UsageError(f"--docs {text!r} names no document: of A:B, A must be below B")
    return slice(start, stop)
