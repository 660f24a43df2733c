"""kvzip's plug-in for pytest: options for `kvzip.testing.suite`, and the fixture `bit_exact`.

It stands beside the library, not in it, so that a pytest which has nothing to do with kvzip does
not import it at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# Here, before any conftest.py imports it.
pytest.register_assert_rewrite("kvzip.testing")
_FOUND = pytest.StashKey[list[tuple[str, Any]]]()
codecs: list[str] = []
"""What ``--kvzip-codec`` names."""
snapshots: list[str] = []
"""What ``--kvzip-snapshot`` names."""
profiles: list[str] = []
"""What ``--kvzip-profile`` names: one at most is used."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvzip", "lossless compression of KV caches")
    group.addoption(
        "--kvzip-codec",
        action="append",
        default=[],
        metavar="NAME",
        help="a codec that kvzip.testing.suite tries (default: all installed that need no profile)",
    )
    group.addoption(
        "--kvzip-snapshot",
        action="append",
        default=[],
        metavar="FILE",
        help="a snapshot file that must come back bit for bit from each codec",
    )
    group.addoption(
        "--kvzip-profile",
        action="append",
        default=[],
        metavar="FILE",
        help="the profile of codecs that need one, for the snapshots",
    )


def pytest_configure(config: pytest.Config) -> None:
    codecs[:] = config.getoption("kvzip_codec")
    snapshots[:] = config.getoption("kvzip_snapshot")
    profiles[:] = config.getoption("kvzip_profile")
    config.stash[_FOUND] = []


@pytest.fixture
def bit_exact(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """:func:`kvzip.testing.assert_bit_exact`, whose ratios pytest shows at its end."""
    from kvzip.testing import assert_bit_exact

    def check(*args: Any, **kwargs: Any) -> Any:
        found = assert_bit_exact(*args, **kwargs)
        request.config.stash[_FOUND] += [(request.node.name, one) for one in found]
        return found

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The caches that came back, and from how few bytes."""
    if found := config.stash.get(_FOUND, []):
        terminalreporter.section("caches that came back bit for bit")
        for name, one in found:
            terminalreporter.line(
                f"{name}: {one.codec} {one.ratio:.2f}x, {one.raw_bytes:,} bytes as "
                f"{one.encoded_bytes:,}"
            )
