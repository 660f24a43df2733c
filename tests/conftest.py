"""What all tests share: how hypothesis runs, and every dtype and codec as a fixture."""

from __future__ import annotations

import gc
import os
from collections import Counter
from datetime import date

# As the command line does it: torch's threads are not to spin while they wait, which takes most of
# the processor's time where tests run beside other work. Torch reads it once, when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processors
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from servers import s3_server
from support import CODECS

from kvzip import dtypes
from kvzip.eval.speed import bench

# Tests may run beside other work, where whatever comes first takes long.
unhurried = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("kvzip", max_examples=25, **unhurried)
settings.register_profile("kvzip-long", max_examples=500, **unhurried)  # make test-long
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kvzip"))


@pytest.hookimpl(optionalhook=True)  # the engines' environments have no xdist
def pytest_xdist_auto_num_workers():
    """One more than there are processors, since some tests wait; each takes 1 to 2 GB, and some ten
    seconds for what it imports."""
    return min(4, (os.cpu_count() or 1) + 1)


# Set here, before other processes begin, so that midnight between them changes nothing.
DAY = int(os.environ.setdefault("KVZIP_TEST_DAY", str(date.today().toordinal())))


# Seconds, ten times what the longest test takes on a slow machine: one that hangs is to fail by its
# name before all runs out of time, or of memory.
LONGEST = 600


def pytest_addoption(parser):
    parser.addoption(
        "--draw", action="store_true", help="of cases marked drawn(n) the day's, which are one in n"
    )


def pytest_report_header(config):
    return f"cases of day {DAY} (KVZIP_TEST_DAY)" if config.getoption("draw") else None


def draw(items):
    """Of each function's cases marked `drawn(n)` every n-th, others the next day; and the rest."""
    seen, chosen, others = Counter(), [], []
    for item in items:
        mark = item.get_closest_marker("drawn")
        function = item.path, item.parent.name, getattr(item, "originalname", item.name)
        wanted = mark is None or (seen[function] + DAY) % mark.args[0] == 0
        (chosen if wanted else others).append(item)
        seen[function] += 1
    return chosen, others


@pytest.fixture(scope="session", autouse=True)
def caches_stay_as_they_are():
    """What is timed here need not begin with empty caches, for which four times as much memory as
    they hold, a gigabyte on some servers, would be read before each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_sweep", lambda: np.ones(1, np.uint8))
        yield


@pytest.fixture(params=dtypes.NAMES)
def dtype(request):
    return request.param


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def pytest_collection_modifyitems(items, config):
    """Files marked `first`, then those with most tests: pytest-xdist hands files out in this order,
    so that the last ones are short and no worker waits long for another."""
    if config.getoption("draw"):
        items[:], others = draw(items)
        config.hook.pytest_deselected(items=others)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("first") is None, -tests[item.path]))
    if config.pluginmanager.hasplugin("timeout"):  # which the engines' environments have not
        for item in items:
            if item.get_closest_marker("long") is None:
                item.add_marker(pytest.mark.timeout(LONGEST, method="signal"))


def pytest_collection_finish():
    """What is imported by now, a million objects, stays: `gc.collect()` need not look at it, which
    tests/soak/leaks.py calls hundreds of times, and Python itself does."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Nor at what a file of tests has imported."""
    if nextitem is not None and item.path != nextitem.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed goes to pytest as UTF-8, which names that are not cannot."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report
