"""What a run says about its machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import subprocess, sys
heavy = bytearray(b"x") * (900 << 20)
code = "from clearhead.train.environment import peak_memory_bytes; print(peak_memory_bytes())"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage inherits a parent's peak over exec on Linux alone")
def test_peak_memory_is_the_process_s_own() -> None:
    """A small process that a large one started reports its own peak, not its parent's 900 MiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert 20 << 20 < int(done.stdout) < 800 << 20
