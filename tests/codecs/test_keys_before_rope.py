"""Keys that `channel` stores as they were before RoPE: what is told of them."""

from __future__ import annotations

import pytest
from command import run, run_json
from support import assert_same, rotated

import kvzip

BEFORE = "channel:keys=before_rope"


@pytest.fixture
def snapshot():
    """Of three layers, the last with keys of which RoPE says nothing."""
    document = rotated(1, layers=3)
    without = document.layers[0].layout
    alone = kvzip.LayerLayout.of_kv((3, 400, 32), (3, 400, 32), "bf16", 400, "full", None)
    assert without.rope == 0
    layers = [
        *document.layers[:2],
        kvzip.Layer.of_kv(document.layers[2].k, document.layers[2].v, alone),
    ]
    return kvzip.Snapshot(layers, "bf16", origin=document.origin)


def test_info_tells_which_parts_are_stored_before_rope(tmp_path, capsys, snapshot):
    path = tmp_path / "s.kvz"
    path.write_bytes(kvzip.encode(snapshot, BEFORE))
    found = {(p.part, p.before_rope): p.layers for p in kvzip.info(path).parts}
    assert found == {("k", True): 2, ("k", False): 1, ("v", False): 3}
    told = run_json(capsys, "info", path)[1]["parts"]
    assert {(p["part"], p["before_rope"]): p["layers"] for p in told} == found
    out = " ".join(run(capsys, "info", path)[1].split())
    assert "k of 2 full layers is stored as it was before RoPE" in out
    path.write_bytes(kvzip.encode(snapshot, "channel:keys=cached"))
    assert not any(p.before_rope for p in kvzip.info(path).parts)
    assert "before RoPE" not in run(capsys, "info", path)[1]
    path.write_bytes(kvzip.encode(rotated(1, 1), BEFORE))  # too few to tell
    assert not any(p.before_rope for p in kvzip.info(path).parts)


def test_the_command_line_takes_the_setting(tmp_path, capsys, snapshot):
    document, path = tmp_path / "d.safetensors", tmp_path / "d.kvz"
    snapshot.save(document)
    sizes = []
    for codec in ("channel:keys=cached", BEFORE):
        code, _, _ = run(capsys, "encode", document, "-o", path, "--codec", codec)
        assert code == 0
        sizes.append(path.stat().st_size)
        assert_same(kvzip.decode(path), snapshot)
    assert sizes[1] < sizes[0]
    assert run(capsys, "encode", document, "-o", path, "--codec", "channel:keys=no")[0] != 0


@pytest.mark.parametrize("tokens", [20, 100, 400])
@pytest.mark.parametrize("channels", [16, 32])
def test_a_part_that_is_on_a_grid_in_some_channels(tokens, channels):
    """The codec is asked for tables of the part, of its channels off the grid, and of its codes:
    none is taken for another, and keys before RoPE are not for what is on a grid."""
    document = rotated(3, tokens, layers=1)
    k = document.layers[0].k.copy()
    k[..., :channels] &= 0xFFF0  # numbers of fp8_e4m3fn, with scales
    held = document.layers[0].layout
    found = kvzip.Snapshot(
        [kvzip.Layer.of_kv(k, document.layers[0].v, held)], "bf16", origin=document.origin
    )
    for codec in (BEFORE, "channel"):
        for block_tokens in (64, 1024):
            blob = kvzip.encode(found, codec, block_tokens=block_tokens)
            assert_same(kvzip.decode(blob), found)
