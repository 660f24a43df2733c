"""Exactness at scale: lossless codecs change nothing, quantising does, and both are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import msgspec  # noqa: E402
from support import tiny_model  # noqa: E402

import kvzip  # noqa: E402
from kvzip import capture, dtypes  # noqa: E402
from kvzip.eval.exactness.corpus import run  # noqa: E402
from kvzip.eval.exactness.lossy import quantised  # noqa: E402
from kvzip.eval.results import stored  # noqa: E402
from kvzip.eval.results.exactness import ExactnessResult  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    loaded = tiny_model("Llama", initializer_range=0.3)
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("documents")
    paths = []
    for n in range(3):
        snapshot = capture.prefill(loaded, rng.integers(0, 200, 40).astype(np.uint32), text=str(n))
        snapshot.save(folder / f"{n}.safetensors")
        paths.append(folder / f"{n}.safetensors")
    return loaded, paths


def test_what_lossless_buys(made: Any, tmp_path: Path) -> None:
    loaded, paths = made
    found = run(paths, codecs=("raw", "channel"), continuations=3, new_tokens=8, loaded=loaded)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["raw", "channel", "int8", "int4"]
    assert found.exact and found.continuations == 3 and found.document_tokens == [40, 40, 40]
    for name in ("raw", "channel"):
        row = rows[name]
        assert (row.runs, row.exact_runs, row.documents_exact) == (9, 9, 3)
        assert row.tokens == row.tokens_equal == row.tokens_matching == 72
        assert row.max_logit_difference == 0 and not row.lossy
    for name, bits in (("int8", 8), ("int4", 4)):
        row = rows[name]
        assert row.lossy and row.exact_runs == row.documents_exact == 0
        assert row.max_logit_difference > 0
        assert row.ratio == pytest.approx(16 * 40 / (bits * 40 + 16))
        assert row.tokens_equal <= row.tokens_matching <= row.tokens
        assert row.worst_tokens_matching <= 8
    assert rows["int4"].tokens_matching < rows["int8"].tokens_matching
    assert rows["int4"].max_logit_difference > rows["int8"].max_logit_difference
    assert found.fresh.runs == 9
    path = tmp_path / "exactness.json"
    stored.save(found, path)
    assert stored.load(path, ExactnessResult) == found


def test_it_goes_on_where_it_was_ended(made: Any, tmp_path: Path) -> None:
    loaded, paths = made
    given = {"codecs": ("channel",), "continuations": 2, "new_tokens": 4, "loaded": loaded}
    whole = run(paths, **given)
    said: list[tuple[str, float]] = []

    def ended(what: str, share: float = 0.0) -> None:
        said.append((what, share))
        if what == "document 2 of 3: continuation 2 of 2, int4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(paths, **given, work=tmp_path, step=ended)
    assert [share for _, share in said] == sorted({share for _, share in said})
    assert said[-1][1] < 2 / 3
    before = len(said)
    found = run(paths, **given, work=tmp_path, step=lambda *now: said.append(now))
    assert not any(what.startswith("document 1") for what, _ in said[before:])
    assert (found.rows, found.fresh) == (whole.rows, whole.fresh)
    other = run(paths, **(given | {"new_tokens": 5}), work=tmp_path)
    assert {row.tokens for row in other.rows} == {30}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_numbers_are_near_and_few(dtype: str, bits: int) -> None:
    kind = getattr(torch, dtypes.get(dtype).torch)
    numbers = (torch.randn(2, 50, 8) * torch.logspace(-3, 3, 8)).to(kind)
    snapshot = kvzip.Snapshot.from_arrays([(numbers, numbers)])
    rounded, size = quantised(snapshot, bits)
    assert size == 2 * (numbers.numel() * bits // 8 + 2 * 2 * 8)
    back = rounded.tensors()[0][0].float()
    top = numbers.float().abs().amax(dim=-2, keepdim=True)
    step = top / (2 ** (bits - 1) - 1)
    slack = {"bf16": 2**-8, "fp16": 2**-10, "fp32": 1e-6}[dtype]
    assert ((back - numbers.float()).abs() <= step / 2 + slack * top).all()
    for head in range(2):
        for channel in range(8):
            assert len(set(back[head, :-1, channel].tolist())) <= 2**bits
    assert torch.equal(back[:, -1], numbers[:, -1].float())


def test_what_cannot_be_tried(made: Any, tmp_path: Path) -> None:
    loaded, paths = made
    for arguments, says in (
        ({"snapshots": []}, "at least one snapshot"),
        ({"snapshots": paths, "lossy": ("int2",)}, "no lossy reference 'int2'; there are: int8"),
        ({"snapshots": paths, "continuations": 0}, "continuations is 0: it must be from 1"),
        ({"snapshots": paths, "codecs": ("predictive",)}, "needs a profile"),
    ):
        with pytest.raises(kvzip.KVZipError, match=says):
            run(**arguments, loaded=loaded, new_tokens=1)
    other = kvzip.Snapshot.load(paths[0])
    other.origin = msgspec.structs.replace(other.origin, revision="another")
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(kvzip.KVZipError, match="not of the model and dtype"):
        run(
            [paths[0], tmp_path / "other.safetensors"], loaded=loaded, new_tokens=1, codecs=("raw",)
        )
    (tmp_path / "x.json").write_text('{"kind": "exactness", "version": 1}')
    with pytest.raises(kvzip.KVZipError, match="not a result of kvzip eval exactness"):
        stored.load(tmp_path / "x.json", ExactnessResult)
