"""What a long-running server asks of the machine's allocator; and where it has none to ask."""

import ctypes
import platform

import pytest

from nanochat_hf import hardware

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # mallinfo(3)


class AllocatorState(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_large_blocks_are_mapped_by_themselves():
    """Also after one of 8 MiB was freed, from which on glibc would put blocks of 1 MiB into its heap."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("glibc is older than 2.33")
    libc.mallinfo2.restype = AllocatorState
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    hardware.return_freed_memory()
    libc.free(libc.malloc(8 * 2**20))
    before = libc.mallinfo2().hblks
    blocks = [libc.malloc(2**20) for _ in range(20)]
    mapped = libc.mallinfo2().hblks - before
    for block in blocks:
        libc.free(block)
    assert mapped >= 20 - 5  # other threads may have freed a few of theirs meanwhile


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_allocator_is_left_alone(missing, monkeypatch):
    def no_library(_):
        raise missing

    monkeypatch.setattr(hardware.ctypes, "CDLL", no_library)
    hardware.return_freed_memory()
