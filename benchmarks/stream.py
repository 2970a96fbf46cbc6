"""`python -m benchmarks.stream`: a stream of 200,000 tokens, and what is held meanwhile.

Three decoders that keep a bounded past: performer (sums), Transformer-XL memory (layer inputs, and the open segment's
keys), Feedback (a window of shared memories). Each is tiny and runs in a process of its own, on one thread. The first
and the last 10,000 tokens come one by one, each drawn from the logits of the one before it; those between are given,
ten in a call, which is the same to the state and ends sooner. Of each is told

    state     bytes that the state says it holds: the most in the first tenth of the stream, and the most after it
    process   the resident set after a hundredth of the stream, at the end, and its peak in between
    speed     tokens per CPU second, over the first and the last 10,000, one by one

A flat state is the claim; the resident set would show what the state does not count, such as a graph that is kept.

    python -m benchmarks.stream                  # about four minutes of one core
    python -m benchmarks.stream --save           # and write benchmarks/results/stream-cpu-DATE.json
    python -m benchmarks.stream --only memory    # one of them; with --save it is put beside what the file has
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clearhead.bench.machine import cpu_model
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model

TOKENS = 200_000
ALONE = 10_000
"""Tokens at either end that come one by one."""
TOGETHER = 10
LOOKS = 1000
"""Times at which the resident set is read."""


@dataclass(frozen=True)
class Stream:
    """A model, and the state that it decodes with."""

    config: ModelConfig
    start: Callable[[Any], Any]
    size: Callable[[Any], int] = field(default=lambda state: int(state.bytes))


SIZE: dict[str, Any] = {"vocab_size": 257, "layers": 1, "width": 32, "heads": 2, "context": 64}
STREAMS = {
    "performer": Stream(
        ModelConfig(**SIZE, attention="performer:features=32"),
        lambda model: model.new_state(1, TOKENS),
        lambda state: sum(cache.bytes for cache in state.caches),
    ),
    "memory": Stream(ModelConfig(**SIZE, position="xl", memory="full:256"), lambda model: model.new_stream(1)),
    "feedback": Stream(
        ModelConfig(**SIZE, architecture="feedback", position="relative_key"), lambda model: model.new_state(1)
    ),
}


def resident_kib() -> int:
    """The process's resident set, in KiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def decode(name: str, tokens: int) -> dict[str, Any]:
    """Decode `tokens` tokens one by one."""
    torch.set_num_threads(1)
    stream = STREAMS[name]
    model = build_model(stream.config, 0).eval()
    state, draw = stream.start(model), torch.Generator().manual_seed(0)
    given = torch.randint(0, 256, (1, tokens), generator=draw)
    token, done, alone = given[:, :1], 0, min(ALONE, tokens // 4)
    largest, marks = [0, 0], [time.process_time()]
    resident: list[int] = []
    with torch.inference_mode():
        while done < tokens:
            lonely = done < alone or done >= tokens - alone
            count = 1 if lonely else min(TOGETHER, tokens - alone - done)
            logits = model(token if lonely else given[:, done : done + count], state=state)
            if lonely:
                token = torch.multinomial(logits[0, -1].softmax(-1), 1, generator=draw)[None]
            late = done > tokens // 10
            largest[late] = max(largest[late], stream.size(state))
            done += count
            if done * LOOKS // tokens > len(resident):
                resident.append(resident_kib())
            if done in (alone, tokens - alone, tokens):
                marks.append(time.process_time())
    settled = resident[len(resident) // 100 :]
    return {
        "model": stream.config.to_dict(),
        "tokens": tokens,
        "state_bytes_first_tenth": largest[0],
        "state_bytes_after": largest[1],
        "resident_kib_settled": settled[0],
        "resident_kib_peak": max(settled),
        "resident_kib_end": settled[-1],
        "tokens_per_cpu_second_first": round(alone / (marks[1] - marks[0])),
        "tokens_per_cpu_second_last": round(alone / (marks[3] - marks[2])),
        "cpu_seconds": round(marks[3] - marks[0], 1),
        "load_at_end": os.getloadavg(),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """One row."""
    first, after = found["state_bytes_first_tenth"], found["state_bytes_after"]
    grown = found["resident_kib_end"] - found["resident_kib_settled"]
    return (
        f"{name:10} {found['tokens']:>8,} tokens  state {first:>8,} -> {after:>8,} bytes  resident "
        f"{found['resident_kib_settled']:>8,} {grown:+,} KiB  {found['tokens_per_cpu_second_first']:>5,} -> "
        f"{found['tokens_per_cpu_second_last']:>5,} tokens/s"
    )


def main() -> None:
    """Decode each stream in a process of its own, print a row each, and save them when asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = Path(__file__).parent / "results" / f"stream-cpu-{date}.json"
    for name in asked.only:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(decode, (name, asked.tokens))
        print(line(name, found), flush=True)
        if asked.save:
            results = json.loads(path.read_text())["results"] if path.exists() else {}
            made = {
                "date": date,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu": cpu_model(),
                "threads": 1,
            }
            path.write_text(json.dumps({**made, "results": {**results, name: found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
