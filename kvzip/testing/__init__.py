"""Tests that a codec, an adapter or a cache of your own runs against itself; for pytest.

:class:`CodecContract` is what every codec must do, :class:`AdapterContract` what keeps a cache and
gives it back, :func:`assert_bit_exact` whether one cache comes back. The library's own tests are
these same ones. Needs the extra, ``pip install 'kvzip[testing]'``; the rest of kvzip needs none of
it.
"""

from kvzip.errors import KVZipError

try:
    from kvzip.testing.adapters import Adapter, AdapterContract
    from kvzip.testing.codecs import CodecContract
except ModuleNotFoundError as error:
    if (error.name or "").startswith("kvzip"):
        raise
    raise KVZipError(f"tests need the extra: pip install 'kvzip[testing]' ({error})") from error
from kvzip.testing.caches import cache_like, make_snapshot, nearest_bits, random_bits
from kvzip.testing.damage import reseal
from kvzip.testing.exactness import Exactness, assert_bit_exact, assert_same

__all__ = [
    "Adapter",
    "AdapterContract",
    "CodecContract",
    "Exactness",
    "assert_bit_exact",
    "assert_same",
    "cache_like",
    "make_snapshot",
    "nearest_bits",
    "random_bits",
    "reseal",
]
