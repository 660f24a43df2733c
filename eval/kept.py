"""What was measured is kept in small files, so that an ended run goes on where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from kvzip.errors import CorruptError, FormatError
from kvzip.files import replacing
from kvzip.parsing import from_json

_log = logging.getLogger("kvzip.eval")
_T = TypeVar("_T")


def kept(
    place: Path,
    form: type[_T],
    compute: Callable[[], _T],
    fits: Callable[[_T], bool] = lambda known: True,
) -> _T:
    """What a JSON file holds. Where it is not there, is damaged or does not fit, what `compute`
    gives, which is then kept there."""
    if place.is_file():
        try:
            known = from_json(place.read_bytes(), form)
            if fits(known):
                return known
        except (CorruptError, FormatError) as error:
            _log.warning("%s is damaged and measured anew: %s", place, error)
    found = compute()
    with replacing(place, private=False) as file:
        file.write(msgspec.json.encode(found))
    return found
