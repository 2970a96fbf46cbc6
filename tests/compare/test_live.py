from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from clearhead.compare.live import Follower, Progress, clock
from clearhead.compare.pool import Task
from clearhead.compare.verdict import Status


def line(step: int, **values) -> str:
    return json.dumps({"kind": "train", "step": step, "tokens": step * 10, "loss": 1.0 / step} | values) + "\n"


def test_a_follower_reads_whole_lines_and_starts_anew_when_the_file_shrinks(tmp_path):
    follower = Follower(tmp_path / "metrics.jsonl")
    follower.poll()
    assert follower.step == {}
    text = line(1) + line(2) + line(2, kind="eval", bits_per_byte=3.0)
    follower.path.write_text(text + line(3)[:9])
    follower.poll()
    assert (follower.step["step"], follower.evaluation["bits_per_byte"]) == (2, 3.0)
    follower.path.write_text(text + line(3))
    follower.poll()
    assert follower.step["step"] == 3
    follower.path.write_text(line(1))  # a resumed run cut it back to its checkpoint
    follower.poll()
    assert follower.step["step"] == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.4, "0 s"), (59.4, "59 s"), (200, "3:20"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_table_shows_what_is_done_and_takes_any_name(tmp_path):
    tasks = [Task("[odd] name", seed, tmp_path / str(seed), {}, 100) for seed in range(3)]
    tasks[0].folder.mkdir()
    (tasks[0].folder / "metrics.jsonl").write_text(line(100, kind="eval", bits_per_byte=2.5))
    progress = Progress("comparing", tasks, [], 2, show=True)
    progress.console = Console(file=io.StringIO(), width=120)
    progress.end(tasks[0], Status.FINISHED, "")
    progress.end(tasks[1], Status.CRASHED, "[killed]")
    progress.console.print(progress.table())
    shown = progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert "[odd] name, seed 1: crashed [killed]" in shown
    assert "2/3 (1 failed)" in shown
    assert "mean 2.500" in shown
    assert "2 of 3 runs" in shown
