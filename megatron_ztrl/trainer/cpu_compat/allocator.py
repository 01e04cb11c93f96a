"""Keeps the memory of freed tensors in the process."""

from __future__ import annotations

import ctypes

_KEPT_BYTES = 1 << 30
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""Parameters of ``mallopt(3)``."""


def keep_freed_memory() -> None:
    """Makes glibc reuse freed blocks below a gibibyte, where it would give them back to the kernel.

    Torch has no caching allocator on the CPU: every activation would be mapped anew and cost a page fault per
    4 KiB, which takes longer than computing it. Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
