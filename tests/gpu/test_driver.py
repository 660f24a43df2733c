"""The way through CUDA's own interface, with a driver that puts work off as long as it may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest

from kvzip.codecs.native.cuda import gpu
from kvzip.errors import KVZipError, UnsupportedError

pytestmark = pytest.mark.first

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    pytest.importorskip(
        "cuda.bindings.driver", reason="cuda-bindings (kvzip[gpu]) is not installed"
    )
    if os.environ.get("KVZIP_TEST_DEVICE") or not shutil.which("g++"):
        pytest.skip("there is a driver, or no compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", str(HERE / "fake_driver.cpp")]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    return library


# A process of some seconds each: one order with every run of the tests, more with `test-long`.
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 8))]
)
def test_what_must_wait_waits(driver, tmp_path, compiled_once, seed):
    """Copies and kernels of several streams, in any order that the driver is free to take."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(driver.parent),
        "KVZIP_FAKE_DRIVER": str(driver),
        "KVZIP_FAKE_SEED": str(seed),
        "PYTHONPATH": str(HERE.parent),
    }
    script = [sys.executable, str(HERE / "through_driver.py"), str(tmp_path), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "well", done.stderr[-3000:]


def test_what_the_doctor_says_of_a_gpu(driver):
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(driver.parent),
        "KVZIP_FAKE_DRIVER": str(driver),
    }
    code = "from kvzip.codecs.native.cuda.gpu import gpus; print(*gpus())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    wanted = "About(name='a driver of the tests', architecture='sm_90', memory_gib=1.5)"
    assert done.stdout.strip() == wanted, done.stderr[-3000:]


def test_a_driver_that_is_too_old_is_no_gpu(driver):
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(driver.parent),
        "KVZIP_FAKE_DRIVER": str(driver),
        "KVZIP_FAKE_VERSION": "12090",
    }
    code = "from kvzip.codecs.native.cuda.device import get_device; get_device('cuda')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "UnsupportedError" in last and "CUDA 12.9" in last and "580" in last


def test_what_nvrtc_does_not_compile_is_told(monkeypatch, tmp_path):
    pytest.importorskip("cuda.core", reason="cuda-core (kvzip[gpu]) is not installed")
    with pytest.raises(UnsupportedError, match=r"copy.cuh does not compile for sm_12: "):
        gpu.compiled_anew("native/cuda/copy.cuh", "sm_12")


def test_kernels_that_were_damaged_on_disk_are_compiled_anew(tmp_path, monkeypatch):
    """By us, if they are not what was written; or else if the driver does not take them."""
    given = []

    class Driver:
        def cuModuleLoadData(self, code):
            given.append(code)
            return (0, code) if code == b"whole" else (Status.CUDA_ERROR_INVALID_IMAGE, None)

    class Status(IntEnum):
        CUDA_ERROR_INVALID_IMAGE = 200

    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "compiled_anew", lambda *_: (b"whole", ""))
    assert gpu.compiled("native/cuda/copy.cuh", "sm_90") == b"whole"
    [kept] = tmp_path.rglob("*.cubin")
    device = object.__new__(gpu.CudaDevice)
    device._driver, device.architecture = Driver(), "sm_90"
    good = kept.read_bytes()
    for damaged in (b"", b"who", b"whole", good[:-1], good[1:], b"?" + good[1:], good + b"\0"):
        kept.write_bytes(damaged)
        assert device._loaded("native/cuda/copy.cuh") == b"whole" and kept.read_bytes() == good
    assert {*given} == {b"whole"}
    monkeypatch.setattr(gpu, "compiled_anew", lambda *_: (b"no kernels", ""))
    kept.unlink()
    with pytest.raises(KVZipError, match="INVALID_IMAGE"):
        device._loaded("native/cuda/copy.cuh")
