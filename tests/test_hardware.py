"""What a long-running server asks of the machine's allocator; and where it has none to ask."""

import platform
import subprocess
import sys

import pytest

from nanochat_hf import hardware

# In a process of its own, whose heap has no room left for large blocks; fields from mallinfo(3).
COUNT_MAPPED = """
import ctypes
from nanochat_hf.hardware import return_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = State, ctypes.c_void_p, [ctypes.c_void_p]
return_freed_memory()
libc.free(libc.malloc(16 * 2**20))
before = libc.mallinfo2().hblks
blocks = [libc.malloc(8 * 2**20) for _ in range(20)]
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_large_blocks_are_mapped_by_themselves():
    """Also after one of 16 MiB was freed, from which on glibc would put smaller ones into its heap."""
    output = subprocess.run([sys.executable, "-c", COUNT_MAPPED], capture_output=True, text=True)
    if "undefined symbol: mallinfo2" in output.stderr:
        pytest.skip("glibc is older than 2.33")
    assert output.stdout.strip() == "20", output.stderr


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_allocator_is_left_alone(missing, monkeypatch):
    def no_library(_):
        raise missing

    monkeypatch.setattr(hardware.ctypes, "CDLL", no_library)
    hardware.return_freed_memory()
