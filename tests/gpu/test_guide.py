"""docs/gpu.md runs as written, with the shim for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from support import cache_like, make_snapshot

import kvzip
from kvzip import dtypes
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.container import on_device, writer

GUIDE = Path(__file__).parents[2] / "docs" / "gpu.md"


def test_the_guide(compiled_once, tmp_path, monkeypatch):
    shim, find = ShimDevice(tensors=True), on_device.get_device
    monkeypatch.chdir(tmp_path)
    for module in (on_device, writer):
        monkeypatch.setattr(module, "get_device", lambda d: shim if d == "cuda" else find(d))
    monkeypatch.setattr(dtypes, "on_gpu", lambda tensor: True)
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=2, heads=2, tokens=200, dim=16)
    Path("doc.kvz").write_bytes(kvzip.encode(snapshot))
    names, expected = {"torch": torch}, kvzip.decode("doc.kvz").tensors()
    for n, code in enumerate(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)):
        exec(re.sub(r'(torch\.empty\(.*?), device="cuda"\)', r"\1)", code), names)
        if n == 0:
            for mine, layer in zip(names["out"], expected, strict=True):
                for a, b in zip(mine, layer, strict=True):
                    assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    # What was written last holds the last layer.
    rows = torch.cat([names["caches"][1][page] for page in names["pages"]])[:200].transpose(0, 1)
    assert torch.equal(rows.view(torch.int16), torch.cat(expected[1], -1).view(torch.int16))
    assert names["part"].layers[0].k.shape == (2, 84, 16)
    assert "channel_encode_bf16" in shim.launched
    assert kvzip.decode(names["blob"]).tensors()[1][0].equal(expected[1][0])
