"""CONTRIBUTING's worked example works: one file, from the grammar to the contract and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "softmax_one.py"


def run(arguments: list[str], plugin: Path | str = EXAMPLE) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"CLEARHEAD_PLUGINS": str(plugin)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_example_obeys_the_contract() -> None:
    """Its own terms join the suite by themselves; Rule 1 (values and gradients), 3 (cache) and 4 (padding) run here."""
    done = run(
        [
            *["-m", "pytest", "tests/contract.py", "-q", "-p", "no:cacheprovider", "-m", "not full"],
            *["-k", "softmax_one and (Rule1 or Rule3 or Rule4)"],
        ]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "..." in done.stdout, "no test ran"


@pytest.mark.parametrize(("spec", "says"), [("softmax_one", "chunked"), ("softmax_one+selective+window:9", "chunked")])
def test_the_command_line_knows_it(spec: str, says: str) -> None:
    done = run(["-m", "clearhead", "explain", spec])
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_a_meaningless_product_with_it_is_refused() -> None:
    done = run(["-m", "clearhead", "explain", "softmax_one+laser"])
    assert done.returncode == 2
    assert "sum to 1" in done.stderr


def test_a_broken_plugin_is_one_clear_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    done = run(["-m", "clearhead", "explain", "softmax_one"], broken)
    assert done.returncode == 2
    assert "broken.py failed" in done.stderr
    assert "Traceback" not in done.stderr
    missing = run(["-m", "clearhead", "explain", "softmax_one"], tmp_path / "absent.py")
    assert missing.returncode == 2
    assert "no such file" in missing.stderr
