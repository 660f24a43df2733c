"""What releases are made with keeps what others lay beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_only_what_is_of_kvzip_makes_room(tmp_path):
    make_room = runpy.run_path(str(ROOT / "release" / "wheels.py"))["make_room"]
    make_room(tmp_path / "new" / "folder")
    for name in ("kvzip-0.1.0.tar.gz", "kvzip-0.1.0-cp311-cp311-linux_x86_64.whl", "another.txt"):
        (tmp_path / name).touch()
    make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.txt", "new"]
