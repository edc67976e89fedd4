"""What becomes of memory that tensors free."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# The largest that glibc takes; tensors above it still come from the system and go back to it each time.
LARGEST_KEPT = 32 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next one, up to 1 GB.

    By its defaults it returns large blocks to the system at once, and each step pays for getting them back page by
    page: a tenth to a sixth of the time of a small model's step. Does nothing outside glibc.
    """
    adjust = _glibc("mallopt")
    if adjust is not None:
        adjust(MMAP_THRESHOLD, LARGEST_KEPT)
        adjust(TRIM_THRESHOLD, 1 << 30)


def return_freed_memory() -> None:
    """Return what has been freed to the system: Arrow and the C library hold on to some of it. Needs glibc."""
    if "pyarrow" in sys.modules:
        import pyarrow as pa

        pa.default_memory_pool().release_unused()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of the C library; musl, macOS and Windows have none of these."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
