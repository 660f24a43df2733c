"""How many threads linear algebra has while a profile is fitted."""

from __future__ import annotations

import threading

import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from kvzip.codecs.predictive import blas


def threads() -> int:
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    return max((library.num_threads for library in libraries), default=1)


@pytest.mark.parametrize("width, each", [(blas.NARROW, 1), (blas.NARROW + 1, 3)])
def test_narrow_layers_have_one_and_give_back_the_others(width, each):
    with threadpool_limits(3, user_api="blas"):
        if threads() != 3:
            pytest.skip("BLAS has no threads here")
        with pytest.raises(ZeroDivisionError), blas.for_width(width):
            assert threads() == each
            raise ZeroDivisionError
        assert threads() == 3


@pytest.mark.parametrize("width", [blas.NARROW, blas.NARROW + 1])
def test_jobs_have_the_threads_that_there_are(width):
    with threadpool_limits(2, user_api="blas"):
        if threads() != 2:
            pytest.skip("BLAS has no threads here")
        together = threading.Barrier(2, timeout=60)

        def job(i):
            together.wait()  # nobody comes by alone
            return i, threads()

        with blas.for_width(width):
            assert blas.side_by_side(job, 2) == [(0, 1), (1, 1)]
            assert blas.side_by_side(lambda i: threads(), 1) == [1 if width == blas.NARROW else 2]
        assert threads() == 2
