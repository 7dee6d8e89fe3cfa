"""Freed blocks leave the process, in one of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, templora.heap
if sys.argv[1] == "told": assert templora.heap.give_back_large_blocks()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
x = bytearray(b"x") * (30 << 20); del x  # from now on glibc keeps blocks of up to this size
blocks = []
for _ in range(60):
    blocks += [bytearray(b"x") * (3 << 20), bytearray(b"x") * 3000]
assert resident() - before > 170 << 20
del blocks[::2]
print(resident() - before)
"""


def kept(word: str, **environment: str) -> int:
    """MB that a process holds after it has freed all of its large blocks but not the small ones between."""
    run = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout) >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_blocks_go_back() -> None:
    assert kept("told") < 20
    assert kept("not told") > 150
    assert kept("not told", MALLOC_MMAP_THRESHOLD_=str(2 << 20)) < 20


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_who_has_chosen_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from templora.heap import give_back_large_blocks

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert not give_back_large_blocks()
