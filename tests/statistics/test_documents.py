"""Documents that are learned from, and others that are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import cache_like, make_snapshot

from kvzip.cli import main
from kvzip.statistics.documents import check_apart


def test_what_is_learned_from_is_not_measured_on(tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for seed, path in zip((1, 2, 1), paths, strict=True):
        make_snapshot(cache_like, seed, "bf16", tokens=64).save(path)
    check_apart(paths[:1], paths[1:2])
    with pytest.raises(ValueError, match=r"2\.safetensors has the same tokens as .*0\.safetensors"):
        check_apart(paths[:2], paths[2:])
    own = [str(path) for path in paths]
    with pytest.raises(SystemExit) as ended:
        main(["fit", own[0], own[2], own[1], "-o", str(tmp_path / "p"), "--held-out", "1"])
    assert ended.value.code == 2
    assert "which is learned from" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
