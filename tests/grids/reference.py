"""What grids mean, in float64, which holds every product exactly: codes times scales, rounded."""

from __future__ import annotations

import numpy as np
import torch

# precision, exponent of the smallest step, and of the largest binade
WIDE = {"bf16": (8, -133, 127), "fp16": (11, -24, 15), "fp32": (24, -149, 127)}
FLOAT8 = {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}
NARROW = [*FLOAT8, "fp4_e2m1", "int8", "int4"]


def values(narrow):
    """The value of each code, in order; codes of 4 bits are 0 ... 15."""
    codes = np.arange(256, dtype=np.uint8)
    if narrow in FLOAT8:
        return torch.from_numpy(codes).view(FLOAT8[narrow]).double().numpy()
    if narrow == "fp4_e2m1":
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    if narrow == "int4":
        return np.array([*range(8), *range(-8, 0)], float)
    return codes.view(np.int8).astype(float)


def rounded(x, wide):
    """float64 numbers to the precision of another format; ties to even."""
    precision, lowest, top = WIDE[wide]
    exponent = np.frexp(np.where(np.isfinite(x) & (x != 0), x, 1.0))[1] - precision
    step = np.ldexp(1.0, np.maximum(exponent, lowest))
    with np.errstate(invalid="ignore"):
        y = np.rint(x / step) * step
    return np.where(np.abs(y) >= 2.0 ** (top + 1), np.copysign(np.inf, x), y)


def bits(x, wide):
    """The bits of float64 numbers that the format has."""
    if wide == "fp16":
        found = x.astype(np.float16).view(np.uint16)
        quiet = np.uint16(0x7E00)
    else:
        found = x.astype(np.float32).view(np.uint32)
        quiet = np.uint32(0x7FC00000)
    top = found.dtype.type(1 << (8 * found.itemsize - 1))
    found = np.where(np.isnan(x), quiet | (found & top), found)
    return (found >> 16).astype(np.uint16) if wide == "bf16" else found


def widened(codes, narrow, scales, group, wide, rounding="once"):
    """Bits of [..., tokens, channels] codes times float64 scales, one for each group."""
    tokens, channels = codes.shape[-2:]
    spread = scales.repeat(group[0], axis=-2)[..., :tokens, :]
    spread = spread.repeat(group[1], axis=-1)[..., :channels]
    with np.errstate(all="ignore"):
        x = values(narrow)[codes] * spread
        if rounding == "through_fp32":
            x = rounded(x, "fp32")
        x = rounded(x, wide)
        # NaN without a sign: what the formats that have one NaN become
        if narrow.endswith("fnuz"):
            x = np.where(np.isnan(x), np.nan, x)
        return bits(x, wide)
