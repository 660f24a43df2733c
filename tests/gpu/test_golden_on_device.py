"""Golden files are read on a device to the numbers that were written, too."""

from __future__ import annotations

import golden_files
import numpy as np
import pytest
import torch
from golden_files import NOW

import kvzip
from kvzip import dtypes

FILES = {
    name: line
    for name, line in golden_files.manifest(NOW).items()
    if name.endswith(".kvz") and not name.startswith("sealed")
}


def bits_of(part, uint):
    """The numbers' bits, of an array or of a tensor on the device."""
    if isinstance(part, torch.Tensor):
        part = dtypes.as_bits(part.cpu())[0] if part.is_floating_point() else part.cpu().numpy()
    return np.asarray(part).view(uint)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.drawn(8)
def test_golden_files_are_read_on_a_device(device, name):
    profile = FILES[name].get("profile")
    known = profile and kvzip.Profile.load(NOW / profile)
    expected = golden_files.written(name)
    try:
        found = kvzip.decode(NOW / name, known, device=device)
    except kvzip.UnsupportedError as error:
        assert "device" in str(error) or "GPU" in str(error)
        pytest.skip(str(error))
    for layer, wanted in zip(found.layers, expected.layers, strict=True):
        parts = layer.parts if hasattr(layer, "parts") else dict(zip("kv", layer, strict=True))
        assert {*parts} == {*wanted.parts}
        for part, bits in wanted.parts.items():
            assert np.array_equal(bits_of(parts[part], bits.dtype), bits), part
