"""Docstrings name things by Sphinx's roles; the site shows these names as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites every docstring when it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = text.replace("][", "]\\[")  # shapes, not links
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
