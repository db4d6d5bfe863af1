"""Memory that arrays are read into, and that JAX then uses without a copy on a CPU."""

import math
import threading
from collections.abc import Sequence

import numpy as np

_ALIGNMENT = 64  # bytes: without it JAX copies
_SLAB = 32 << 20  # bytes that small arrays share
_SMALL = 4 << 20  # bytes; NumPy asks for large pages from this size on, and memory comes several times faster in those


class BufferPool:
    """Uninitialised arrays. Small ones share slabs; a slab lasts as long as any array in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = np.empty(0, np.uint8)

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Returns an uninitialised array of a shape and dtype. Threads may share the pool."""
        size = math.prod(shape) * dtype.itemsize
        if size >= _SMALL:
            return _aligned(size).view(dtype).reshape(shape)
        with self._lock:
            if size > self._free.size:
                self._free = _aligned(_SLAB)
            buffer, self._free = self._free[:size], self._free[size + -size % _ALIGNMENT :]
        return buffer.view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]
