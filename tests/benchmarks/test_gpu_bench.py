"""The GPU's benchmark runs to its end where there is no GPU: what it times, it also compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu.fake_nvcomp import FakeNvComp, compiled  # noqa: E402

from kvzip.benchmarks import gpu  # noqa: E402
from kvzip.codecs.native.cuda import nvcomp  # noqa: E402
from kvzip.codecs.native.cuda.shim_device import ShimDevice  # noqa: E402
from kvzip.eval.results.gpu import COPY, KERNELS, LINK  # noqa: E402


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ShimDevice:
    """A device whose memory is the host's, and a small cache."""

    def on_host(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*sizes: Any, device: Any = None, pin_memory: bool = False, **more: Any) -> Any:
            return make(*sizes, **more)

        return made

    for name in ("empty", "empty_like", "randn"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda _: generator())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, size in (("LAYERS", 2), ("HEADS", 2), ("DIM", 32)):
        monkeypatch.setattr(gpu, name, size)
    monkeypatch.chdir(tmp_path)
    return ShimDevice(tensors=True)


def test_all_rows_are_there(device: ShimDevice) -> None:
    (name, ratio, none), *rows = gpu.measured(device, 100, "bf16", 2)
    assert name == "ratio" and ratio > 1 and none is None
    rows += gpu.predictive_rows(device, 100, 2)
    names = [name for name, _, _ in rows]
    assert {COPY, LINK, KERNELS} <= {*names} and len({*names}) == len(names) == 15
    assert all(size > 0 and len(seconds) >= 2 for _, size, seconds in rows)


def test_files_that_nvcomp_decodes(
    device: ShimDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it is there, and no rows where it is not."""
    monkeypatch.setenv(nvcomp.ENVIRONMENT, nvcomp.TRUSTED)
    assert not [*gpu.library_rows(device, 100, "bf16", 2)]
    library = device.cache["nvcomp"] = FakeNvComp(compiled(tmp_path))
    rows = [*gpu.library_rows(device, 100, "bf16", 2)]
    assert len({name for name, _, _ in rows}) == len(rows) == 6
    assert {coder for coder, _, _ in library.decoded} == {"lz4", "zstd"}
    monkeypatch.delenv(nvcomp.ENVIRONMENT)
    assert len([*gpu.library_rows(device, 100, "bf16", 2)]) == 2


def test_other_numbers_are_noticed(device: ShimDevice) -> None:
    case = gpu.Case(100, "bf16")
    for out, tensors in zip(case.out, case.snapshot.tensors(), strict=True):
        for mine, want in zip(out, tensors, strict=True):
            mine.copy_(want)
    gpu.check_same(case.out, case.snapshot)
    case.out[1][0].view(torch.int16)[0, 3, 5] ^= 1
    with pytest.raises(AssertionError, match="other numbers"):
        gpu.check_same(case.out, case.snapshot)
