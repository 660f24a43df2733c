"""What Python and C++ both say of a GPU's jobs and of blocks is the same: a compiler says so.

Python cannot read C++ headers, nor NVRTC the standard's, so some numbers are written down more than
once. Where they differed, a kernel would take one field for another.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest
from native.building import FLAGS

from kvzip.codecs.channel import blocks, gpu, gpu_encoding, gpu_rotation
from kvzip.codecs.common import rotation
from kvzip.codecs.native.cuda import work
from kvzip.codecs.planes import gpu as planes
from kvzip.codecs.predictive import codec, density, gpu_model, groups, integers
from kvzip.codecs.predictive import gpu as predictive
from kvzip.entropy import integer_model
from kvzip.selftest import INSTRUCTIONS

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def fields(struct: str, dtype: np.dtype) -> list[str]:
    """That a struct has these fields, where they are, and no more."""
    assert dtype.fields is not None
    at = [f"offsetof({struct}, {name}) == {place}" for name, (_, place, *_) in dtype.fields.items()]
    last = list(dtype.fields)[-1]
    end = dtype.fields[last][1] + dtype.fields[last][0].itemsize
    return [
        *at,
        f"sizeof({struct}) == {dtype.itemsize}",
        f"offsetof({struct}, {last}) + sizeof({struct}::{last}) == {end}",
    ]


def roundings() -> list[str]:
    """What each rounding of RoPE means."""
    found = [f"kRopeRoundings == {len(rotation.ROUNDINGS)}"]
    for each in rotation.ROUNDINGS:
        found.append(f"is_rope_rounding({each})")
        for told in (rotation.is_side_by_side, rotation.is_wide):
            found.append(f"{told.__name__}(RopeRounding({each})) == {int(told(each))}")
    return found


ARITHMETIC = {
    "kCdf": integer_model.CDF,
    "kEscape": integer_model.ESCAPE,
    "kHalf": integer_model.HALF,
    "kClamp": integer_model.LIMIT,
    "kCells": density.CELLS,
    "kAngles": integers.ANGLES,
    "kResidualShift": integers.RESIDUAL_SHIFT,
    "kZBits": 16,
    "kFirstCell": (127 + 15) << 3,
}
"""Of `predictive`, as kernels.hpp has it for processors and density.cuh for a GPU."""


def equal(numbers: dict[str, int]) -> list[str]:
    """That these constants have these values."""
    return [f"{name} == {value}" for name, value in numbers.items()]


def compiled(header: str, space: str, claims: list[str]) -> subprocess.CompletedProcess[str]:
    """What a compiler makes of these claims about a header."""
    text = [f'#include "{header}"', "#include <cstddef>", f"using namespace {space};"]
    text += [f'static_assert({claim}, "{header}");' for claim in claims]
    command = [COMPILER, *FLAGS, "-w", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(
        command, input="\n".join(text), capture_output=True, text=True, check=False
    )


CASES = {
    "native/cuda/copy.cuh": (
        "kvzip::cuda",
        fields("DevicePart", work.PART) + fields("CopyJob", work._COPY),
    ),
    "native/cuda/xxh3.cuh": ("kvzip::cuda", fields("DigestJob", work._DIGEST)),
    "planes/merge.cuh": ("kvzip::planes", fields("MergeJob", planes._MERGE)),
    "channel/decode.cuh": (
        "kvzip::channel",
        [
            f"sizeof(StreamJob) == {gpu._JOB.itemsize}",
            f"kDecodeSharedBytes == {gpu._SHARED}",
        ],
    ),
    "channel/encode.cuh": (
        "kvzip::channel",
        [
            *fields("EncodeJob", gpu_encoding._ENCODE),
            *fields("EncodedStream", gpu_encoding._CODED),
            *fields("PlaceJob", gpu_encoding._PLACE),
            f"kEncodeSharedBytes == {gpu_encoding._SHARED}",
        ],
    ),
    "channel/unturn.cuh": (
        "kvzip::channel",
        [
            *fields("UnturnJob", gpu_encoding._UNTURN),
            f"sizeof(MissingPairs) == {gpu_encoding._MISSING.itemsize}",
        ],
    ),
    "channel/turn.cuh": (
        "kvzip::channel",
        fields("TurnJob", gpu_rotation._TURN) + fields("ExceptionJob", gpu_rotation._EXCEPTION),
    ),
    "channel/block_coder.hpp": (
        "kvzip::channel",
        equal(
            {
                "kRawBlock": blocks.RAW,
                "kCodedBlock": blocks.CODED,
                "kUnturnedBlock": blocks.UNTURNED,
                "kAligned": blocks.HEADER,
            }
        ),
    ),
    "native/rope_rounding.hpp": ("kvzip", roundings()),
    "native/simd.hpp": (
        "kvzip::simd",
        [f"int(Level::{name}) == {number}" for number, name in enumerate(INSTRUCTIONS)]
        + [f"kLevels == {len(INSTRUCTIONS)}"],
    ),
    "predictive/block_parts.hpp": (
        "kvzip::predictive",
        equal(
            {
                "kPredicted": codec.CODED,
                "kUnturned": codec.UNTURNED,
                "kHeaderBytes": codec.HEADER,
                "kRaw": codec.RAW,
                "kByChannel": codec.CHANNEL,
                "kMostTokens": codec.MOST_TOKENS,
                "kMostGroup": groups.MOST,
            }
            | ARITHMETIC
        ),
    ),
    "predictive/device_ranges.hpp": (
        "kvzip::predictive",
        fields("DeviceRange", predictive._RANGE),
    ),
    "native/stored_block.hpp": (
        "kvzip::cuda",
        [*fields("StoredBlock", work.BLOCK), f"kAsTheyAreHeader == {codec.HEADER}"],
    ),
    "predictive/chain.cuh": (
        "kvzip::predictive",
        [
            *fields("RangeJob", predictive._JOB),
            *fields("DeviceChannel", gpu_model._CHANNEL),
            *fields("DeviceCell", gpu_model._CELL),
            *fields("DeviceLayer", gpu_model._LAYER),
            *equal(
                {"kTileTokens": predictive._TILE, "kGuesses": gpu_model._GUESSES}
                | {"kMostLanes": groups.MOST // 2}
                | ARITHMETIC
            ),
        ],
    ),
}
"""By the header: its namespace, and what must hold there."""


@pytest.mark.parametrize("header", CASES)
def test_python_and_the_header_say_the_same(header: str) -> None:
    done = compiled(header, *CASES[header])
    assert not done.returncode, done.stderr[-4000:]


def test_a_difference_is_seen() -> None:
    wrong = [f"kEncodeSharedBytes == {gpu_encoding._SHARED + 1}"]
    done = compiled("channel/encode.cuh", "kvzip::channel", wrong)
    assert done.returncode and "static" in done.stderr
