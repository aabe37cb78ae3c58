"""The driver's calls, against a library of the same names that works on the host."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sievert.bundle.errors import EngineError, EngineUnavailableError
from sievert.engines.run.cuda import CudaMemory, Device

# Signatures as in cuda.h: a wrong argument type in the binding shows as a wrong pointer here.
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr; typedef void *ctx; typedef void *stream;
static int entered, pending;
static int ready(stream s) { return entered && s == (stream)0x7fff12345678ULL ? 0 : 400; }
int cuInit(unsigned flags) { return flags ? 1 : NO_INIT; }
int cuDeviceGetCount(int *n) { *n = DEVICES; return 0; }
int cuDeviceGet(int *device, int n) { *device = 7 + n; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, device == 7 ? "Fake GPU" : "?", size); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 75 ? 8 : what == 76 ? 9 : -1; return device != 7; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 24ULL << 30; return device != 7; }
int cuDevicePrimaryCtxRetain(ctx *c, int device) { *c = (ctx)0x7f0012345678ULL; return device != 7; }
int cuCtxSetCurrent(ctx c) { entered = c == (ctx)0x7f0012345678ULL; return entered ? 0 : 201; }
int cuStreamCreate(stream *s, unsigned flags) { *s = (stream)0x7fff12345678ULL; return flags != 1; }
int cuStreamSynchronize(stream s) { pending = 0; return ready(s); }
int cuMemAlloc_v2(ptr *p, size_t n) { if (n > 1ULL << 40) return 2;
  *p = (ptr)aligned_alloc(256, (n + 255) / 256 * 256); memset((void *)*p, 90, n); return 0; }
int cuMemFree_v2(ptr p) { free((void *)p); return 0; }
int cuMemsetD8Async(ptr p, unsigned char b, size_t n, stream s) { memset((void *)p, b, n); return ready(s); }
int cuMemcpyHtoDAsync_v2(ptr d, const void *h, size_t n, stream s) { memcpy((void *)d, h, n); return ready(s); }
int cuMemcpyDtoHAsync_v2(void *h, ptr d, size_t n, stream s) { memcpy(h, (void *)d, n); return ready(s); }
int cuMemcpyDtoDAsync_v2(ptr d, ptr f, size_t n, stream s) { memcpy((void *)d, (void *)f, n); return ready(s); }
int cuGetErrorString(int e, const char **text) { *text = e == 2 ? "out of memory" : "other"; return 0; }
"""


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler")
    return found


def driver(folder: Path, compiler: str, *, no_init: int = 0, devices: int = 1) -> str:
    (folder / "driver.c").write_text(DRIVER)
    library = folder / "libdriver.so"
    options = ["-shared", "-fPIC", f"-DNO_INIT={no_init}", f"-DDEVICES={devices}"]
    subprocess.run([compiler, *options, "-o", library, folder / "driver.c"], check=True)
    return str(library)


def test_memory_and_device(tmp_path, compiler):
    memory = CudaMemory(driver(tmp_path, compiler))
    assert memory.stream == 0x7FFF12345678
    assert memory.device() == Device("Fake GPU", "8.9", 24 << 10)
    address, other = memory.allocate(64), memory.allocate(64)
    back = np.full(16, 7, np.float32)
    memory.download(back, address)
    assert not back.any()  # allocated memory is cleared
    memory.upload(address, np.arange(16, dtype=np.float32))
    memory.copy(other + 32, address, 32)
    memory.download(back, other)
    assert back.tolist() == [0] * 8 + list(range(8))
    memory.clear(other, 40)
    memory.download(back, other)
    assert back.tolist() == [0] * 10 + list(range(2, 8))
    memory.free(address)
    memory.free(other)
    with pytest.raises(EngineError, match=r"cuMemAlloc_v2 failed with 2 \(out of memory\)"):
        memory.allocate(1 << 41)


@pytest.mark.parametrize("options", [{"no_init": 100}, {"devices": 0}])
def test_a_driver_without_a_device(tmp_path, compiler, options):
    with pytest.raises(EngineUnavailableError, match="shows no GPU"):
        CudaMemory(driver(tmp_path, compiler, **options))


def test_no_driver(tmp_path):
    with pytest.raises(EngineUnavailableError, match="no NVIDIA driver was found"):
        CudaMemory(str(tmp_path / "libgone.so"))


@pytest.mark.gpu
def test_a_real_device():
    memory = CudaMemory()
    address = memory.allocate(12)
    memory.upload(address, np.array([1, 2, 3], np.float32))
    back = np.empty(3, np.float32)
    memory.download(back, address)
    memory.free(address)
    assert back.tolist() == [1, 2, 3]
