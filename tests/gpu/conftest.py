"""The device that these tests run on: the shim, or a real one with KVZIP_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from kvzip.codecs.native.cuda.device import get_device
from kvzip.codecs.native.cuda.shim_device import ShimDevice

KINDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REAL = os.environ.get("KVZIP_TEST_DEVICE")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What is compiled is kept from run to run, apart from the user's own."""
    os.environ.setdefault("KVZIP_CACHE", str(tmp_path_factory.getbasetemp().parent / "kvzip-cache"))


@pytest.fixture(scope="session")
def device(compiled_once):
    if REAL:
        return get_device(REAL)
    if not shutil.which("g++"):
        pytest.skip("the shim needs a C++ compiler")
    return ShimDevice()


@pytest.fixture(scope="session")
def shuffled(compiled_once):
    """A device whose threads run in random order."""
    return get_device(REAL) if REAL else ShimDevice(seed=7)


@pytest.fixture(scope="session")
def room():
    """Makes tensors on the device that surround what is to be written with what must stay."""
    return Room("cuda" if REAL else "cpu")


class Room:
    """Tensors of numbers' bits, strided, in memory full of rubbish."""

    def __init__(self, where: str):
        self.where = where

    def tensor(self, shape, itemsize, order=None, guard=512):
        """[*shape] with its axes in memory in this order, and `guard` numbers before and behind."""
        order = tuple(range(len(shape))) if order is None else order
        lying = [shape[axis] for axis in order]
        count = 1
        for n in lying:
            count *= n
        flat = torch.randint(0, 100, (count + 2 * guard,), dtype=KINDS[itemsize])
        flat = flat.to(self.where)
        back = sorted(range(len(order)), key=lambda i: order[i])
        return flat, flat[guard : guard + count].view(lying).permute(back)
