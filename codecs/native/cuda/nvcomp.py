"""NVIDIA's nvCOMP, where it is installed: LZ4 blocks and Zstandard frames decoded on a GPU.

It is called as the headers of nvidia-libnvcomp-cu13 6.0.0.12 declare it. In 5.3 functions and
structs are others, so another version than 6.0 is left alone.

Of damaged bytes these headers say: LZ4's decoder on the GPU's cores tells of each chunk whether it
is damaged; the hardware's does anything, and passes it for good, so it is not used. Zstandard's
does anything, too, even out of bounds: it is used only for files of which somebody says that they
can be trusted. Either is given only bytes that match their checksums.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvzip.byte_coders import Coder
from kvzip.codecs.native.cuda.device import Device, Kernel, LeftToCPU, MemoryFullError, Stream, up
from kvzip.codecs.native.cuda.work import Work, bytes_at
from kvzip.errors import UsageError

ENVIRONMENT = "KVZIP_NVCOMP"
"""The variable that says what nvCOMP is for: "off" for nothing, "trusted" for Zstandard too."""
TRUSTED = "trusted"

_log = logging.getLogger("kvzip.gpu")
_VERSIONS = range(6000, 6100)
"""As nvcompGetProperties tells them: 6.0, with any patch."""
_ALIGNED = 256
"""At multiples of this begin what it writes, and its scratch memory."""
_CUDA = 2  # NVCOMP_DECOMPRESS_BACKEND_CUDA
_SUCCESS = 0
_UNTOLD = -1  # no status of nvCOMP's


class Properties(ctypes.Structure):
    """`nvcompProperties_t`"""

    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


class Alignments(ctypes.Structure):
    """`nvcompAlignmentRequirements_t`"""

    _fields_ = (
        ("input", ctypes.c_size_t),
        ("output", ctypes.c_size_t),
        ("temp", ctypes.c_size_t),
    )


class ZstdOptions(ctypes.Structure):
    """`nvcompBatchedZstdDecompressOpts_t`"""

    _fields_ = (("backend", ctypes.c_int), ("reserved", ctypes.c_char * 60))


class LZ4Options(ctypes.Structure):
    """`nvcompBatchedLZ4DecompressOpts_t`; what is 0 is NVCOMP_TYPE_CHAR and not shuffled."""

    _fields_ = (
        ("backend", ctypes.c_int),
        ("sort_before_hw_decompress", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("bitshuffle_mode", ctypes.c_int),
        ("reserved", ctypes.c_char * 48),
    )


class Form(NamedTuple):
    """What nvCOMP calls a general coder's bytes, and what it says of them."""

    name: str
    options: type[ctypes.Structure]
    most: int
    """Bytes of a chunk, both as they are stored and as they are decoded
    (nvcomp...DecompressionMaxAllowedChunkSize)."""
    bears_damage: bool


FORMS = {
    "lz4": Form("LZ4", LZ4Options, (1 << 32) - 1, True),
    "zstd": Form("Zstd", ZstdOptions, (1 << 31) - 1, False),
}
"""By the names of our coders."""

_CHECK = np.dtype(
    [
        ("status", "<u8"),
        ("decoded", "<u8"),
        ("expected", "<u8"),
        ("row", "<u4"),
        ("reserved", "<u4"),
    ]
)
_CHECKED = Kernel("native/cuda/chunks.cuh", "check_chunks", "kvzip::cuda", 128, 128)


class Chunk(NamedTuple):
    """What a general coder made of some bytes: where that lies on the host and will on the device,
    how long it is, of how many bytes it is, and whose flag tells of its damage."""

    host: int
    address: int
    length: int
    size: int
    row: int


class NvComp:
    """The library. Raises OSError for a file that is none, LeftToCPU for another version."""

    def __init__(self, path: Path):
        self._library = library = ctypes.CDLL(str(path))
        try:
            found = Properties()
            library.nvcompGetProperties(ctypes.byref(found))
            if found.version not in _VERSIONS:
                raise LeftToCPU(f"nvCOMP is {_dotted(found.version)}, and kvzip knows 6.0")
            library.nvcompGetStatusString.argtypes = [ctypes.c_int]
            library.nvcompGetStatusString.restype = ctypes.c_char_p
            self.version = _dotted(found.version)
            self._decoders = {name: Decoder(self, library, form) for name, form in FORMS.items()}
        except AttributeError as error:
            raise LeftToCPU(f"nvCOMP lacks what it has in 6.0: {error}") from None

    def decoder(self, coder: str) -> Decoder:
        """What decodes the bytes of a coder."""
        return self._decoders[coder]

    def succeeded(self, status: int) -> None:
        """Raise LeftToCPU unless a call went well."""
        if status != _SUCCESS:
            words = self._library.nvcompGetStatusString(status) or b"status %d" % status
            raise LeftToCPU(f"nvCOMP {self.version} says: {words.decode(errors='replace')}")


class Decoder:
    """nvCOMP's functions for one kind of bytes."""

    def __init__(self, library: NvComp, functions: Any, form: Form):
        self._library, self._form = library, form
        self._options = form.options(backend=_CUDA)
        size, address = ctypes.c_size_t, ctypes.c_void_p

        def function(name: str, *arguments: Any) -> Any:
            found = functions[f"nvcompBatched{form.name}Decompress{name}"]
            found.argtypes, found.restype = arguments, ctypes.c_int
            return found

        self._alignments = function(
            "GetRequiredAlignments", form.options, ctypes.POINTER(Alignments)
        )
        self._temporary = function(
            "GetTempSize", size, size, form.options, ctypes.POINTER(size), size, address
        )
        self._decompress = function(
            "Async",
            *(address, address, address, address, size, address, size, address),
            *(form.options, address, address),
        )

    def decode(self, work: Work, coder: Coder, chunks: Sequence[Chunk]) -> list[int]:
        """Have these chunks decoded: the addresses at which their bytes will be, side by side, for
        what `work` is to run from now on. Chunks that nvCOMP does not take `coder` decodes at
        once. Raises CorruptError, and LeftToCPU where nvCOMP does not do its part."""
        aligned = Alignments()
        self._library.succeeded(self._alignments(self._options, ctypes.byref(aligned)))
        # No place is a multiple of 0, and where there is no wish it says 1.
        tells = aligned.input and aligned.output and aligned.temp
        if not tells or _ALIGNED % aligned.output or _ALIGNED % aligned.temp:
            raise LeftToCPU(f"nvCOMP {self._library.version} wants memory at other places")
        places, mine = [0] * len(chunks), []
        for n, chunk in enumerate(chunks):
            stored = bytes_at(chunk.host, chunk.length)
            fits = 0 < chunk.length <= self._form.most and 0 < chunk.size <= self._form.most
            # It does not say that it takes frames without their size, or with more than that.
            if (
                fits
                and not chunk.address % aligned.input
                and coder.begins_as_ours(stored, chunk.size)
            ):
                mine.append(n)
            else:
                places[n] = work.put(coder.decode(stored, chunk.size))
        if mine:
            found = self._put(work, [chunks[n] for n in mine])
            for n, place in zip(mine, found, strict=True):
                places[n] = place
        return places

    def _put(self, work: Work, chunks: Sequence[Chunk]) -> list[int]:
        """The call for these chunks, and the check of what it says of each."""
        count, sizes = len(chunks), np.array([chunk.size for chunk in chunks], np.uint64)
        ends = np.cumsum([up(chunk.size, _ALIGNED) for chunk in chunks])
        needed = ctypes.c_size_t()
        self._library.succeeded(
            self._temporary(
                *(count, int(sizes.max()), self._options, ctypes.byref(needed)),
                *(int(sizes.sum()), None),
            )
        )
        try:
            start, temporary = work.scratch(int(ends[-1])), work.scratch(needed.value)
        except MemoryFullError as error:
            raise LeftToCPU(str(error)) from None
        places = np.uint64(start) + np.append(0, ends[:-1]).astype(np.uint64)
        arguments = (
            work.put(np.array([chunk.address for chunk in chunks], np.uint64)),
            work.put(np.array([chunk.length for chunk in chunks], np.uint64)),
            work.put(sizes),
            decoded := work.put(np.zeros(count, np.uint64)),
            count,
            temporary,
            needed.value,
            work.put(places),
            self._options,
            statuses := work.put(np.full(count, _UNTOLD, np.int32)),
        )

        def call(stream: Stream) -> None:
            handle = None if stream is None else int(stream)
            self._library.succeeded(self._decompress(*arguments, handle))

        work.call(call)
        checks = np.zeros(count, _CHECK)
        checks["status"] = statuses + 4 * np.arange(count, dtype=np.uint64)
        checks["decoded"] = decoded + 8 * np.arange(count, dtype=np.uint64)
        checks["expected"] = sizes
        checks["row"] = [chunk.row for chunk in chunks]
        work.run(_CHECKED, checks)
        found: list[int] = places.tolist()
        return found


def _dotted(version: int) -> str:
    """ "6.0.0" of 6000 (NVCOMP_MAJOR_FROM_SEMVER and so on)."""
    return f"{version // 1000}.{version % 1000 // 100}.{version % 100}"


@cache
def installed() -> tuple[NvComp | None, str]:
    """nvCOMP of NVIDIA's package (kvzip[nvcomp]); or why there is none that can be called."""
    try:
        spec = find_spec("nvidia.libnvcomp")
    except (ImportError, ValueError):  # there is no package of NVIDIA's at all
        spec = None
    folders = (spec and spec.submodule_search_locations) or []
    paths = [path for folder in folders for path in Path(folder).glob("lib*/libnvcomp.so.*")]
    reason = "nvCOMP is not installed: pip install 'kvzip[nvcomp]'"
    for path in sorted(paths):
        try:
            return NvComp(path), ""
        except (OSError, LeftToCPU) as error:
            reason = str(error)
    _log.debug("the CPU decodes lz4 and zstd: %s", reason)
    return None, reason


def allowed() -> list[str]:
    """The coders whose bytes nvCOMP is to decode where it can, as KVZIP_NVCOMP says.

    Raises UsageError when that has no value that it may have.
    """
    chosen = os.environ.get(ENVIRONMENT, "")
    if chosen not in ("", "off", TRUSTED):
        raise UsageError(f'{ENVIRONMENT} is "off" or "{TRUSTED}", not {chosen!r}')
    if chosen == "off":
        return []
    return [name for name, form in FORMS.items() if form.bears_damage or chosen == TRUSTED]


def decoder_of(device: Device, coder: str) -> Decoder | None:
    """What decodes the bytes of a coder ("zstd", "lz4") on a device, if that is to be done there.
    Raises UsageError as :func:`allowed` does."""
    if coder not in allowed():
        return None
    library = device.cache.get("nvcomp")
    if library is None and device.kind == "cuda":
        library = installed()[0]
    return None if library is None else library.decoder(coder)
