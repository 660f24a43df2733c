"""docs/format.md and the codecs' pages are enough to read every golden file: decoders that were
written from them alone (`format_reference.py` and what it stands on) give the same numbers."""

from __future__ import annotations

import format_reference
import golden_files
import numpy as np
import pytest
from golden_files import NOW

import kvzip

FILES = {
    name: line
    for name, line in golden_files.manifest(NOW).items()
    if name.endswith((".kvz", ".kvzpage"))
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.drawn(2)
def test_golden_files_are_read_by_the_page_alone(name):
    data, profile = (NOW / name).read_bytes(), FILES[name].get("profile")
    known = profile and kvzip.Profile.load(NOW / profile)
    if name.endswith(".kvzpage"):
        expected = [array for pair in kvzip.decode_page(data, known) for array in pair]
        found = format_reference.page(data, known)
        assert len(found) == len(expected)
        assert all(map(np.array_equal, found, expected))
        return
    if name.startswith("sealed"):
        pytest.importorskip("cryptography")
        data = format_reference.unsealed(data, golden_files.KEY.secret)
    read = format_reference.File(data, known and format_reference.Profile(known))
    expected = golden_files.written(name)
    assert list(read.parts) == [
        (i, part) for i, layer in enumerate(expected.layers) for part in layer.parts
    ]
    for (i, part), array in read.parts.items():
        assert np.array_equal(array, expected.layers[i].parts[part]), (i, part)
    assert (read.ids is None) == (expected.token_ids is None)
    assert read.ids is None or np.array_equal(read.ids, expected.token_ids)
