import gc
import weakref

import numpy as np
import pytest

from sievert.bundle.errors import EngineError
from sievert.bundle.specs import TensorSpec
from sievert.engines.run.memory import Buffer, HostMemory


def buffer(memory: HostMemory, *shape: int | str, dtype: str = "float32") -> Buffer:
    return Buffer(memory, TensorSpec(name="cache", dtype=dtype, shape=shape))


def test_buffers_are_aligned_zero_and_given_back():
    memory = HostMemory()
    one = buffer(memory, 3, 5)
    assert one.address % 256 == 0
    assert not one.numpy().any()
    one.spare()
    assert len(memory._owned) == 2
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert not memory._owned


def test_rows_are_copied_between_batches():
    memory = HostMemory()
    small, large = buffer(memory, 2, 4), buffer(memory, 3, 4)
    memory.upload(small.address, np.arange(8, dtype=np.float32))
    large.copy_row(2, small, 1)
    assert large.numpy().tolist() == [[0] * 4, [0] * 4, [4, 5, 6, 7]]
    large.clear()
    assert not large.numpy().any()
    with pytest.raises(EngineError, match=r"slot 3 does not exist: choose 0\.\.2"):
        large.copy_row(3, small, 0)
    with pytest.raises(EngineError, match=r"row 2 does not exist: choose 0\.\.1"):
        large.copy_row(0, small, 2)
    with pytest.raises(EngineError, match="does not fit"):
        large.copy_row(0, buffer(memory, 2, 5), 0)
    with pytest.raises(EngineError, match="does not fit"):
        large.copy_row(0, buffer(memory, 2, 4, dtype="float16"), 0)


def test_flip_exchanges_the_two_places():
    memory = HostMemory()
    one = buffer(memory, 2)
    first, second = one.address, one.spare()
    memory.upload(second, np.array([1, 2], np.float32))
    one.flip()
    assert (one.address, one.spare()) == (second, first)
    assert one.numpy().tolist() == [1, 2]


@pytest.mark.parametrize("shape", [("B", 2), (-1, 2)])
def test_named_axes_are_refused(shape):
    with pytest.raises(EngineError, match="only fixed sizes"):
        buffer(HostMemory(), *shape)
