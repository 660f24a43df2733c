"""What holds of every adapter (`kvzip.testing.AdapterContract`) holds of a store; this one is the
example of docs/testing.md."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "testing.md"
[CODE] = [
    code
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    if "AdapterContract" in code
]
exec(compile(CODE, GUIDE, "exec"))
