"""Large blocks of memory go back to the system as soon as they are free.

glibc keeps freed blocks of up to 32 MB for later, in one heap. What a pass keeps for its backward pass is
hundreds of blocks of a few megabytes, which come and go between smaller ones that stay, and the holes they
leave fit the next pass badly: a learning step of a base of 135M parameters took a gigabyte more.
"""

import ctypes
import os
import platform

LARGE = 5 << 18  # bytes: more than the logits of a chunk of 64 tokens among 4,096
M_MMAP_THRESHOLD = -3  # <malloc.h>


def give_back_large_blocks() -> bool:
    """Tell glibc so, for this whole process: for programs, not for libraries.

    Returns:
        Whether it was: not on another libc, nor where MALLOC_MMAP_THRESHOLD_ says otherwise.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
