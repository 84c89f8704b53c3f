"""The C library's heap, for a process that does nothing but serve."""

import ctypes
import platform

_M_ARENA_MAX = -8
"""glibc's malloc.h."""


def share_one_arena() -> None:
    """Lets all threads allocate from one heap. Call it before there are others; no effect without glibc.

    By default glibc gives threads heaps of their own, in pieces of 64 MiB. A step's buffers of some tens of MiB, among
    small objects that live longer, then find room in none of the pieces now and again, and one more is taken: memory
    seems to leak, 30 to 60 MB at a time. The threads hold the GIL for nearly all that they allocate, so that they
    rarely wait for each other here.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
