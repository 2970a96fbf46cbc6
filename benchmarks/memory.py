"""`python -m benchmarks.memory`: what relative positions and long memories cost in a training step, as ratios.

One process, one thread, interleaved: each round times a step of every arm, so that a busy machine slows all alike. The
ratio to the arm named first is taken within a round; the table has the median and the minimum over rounds. CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder

ROWS, SEGMENT = 4, 128
SIZE: dict[str, Any] = {"layers": 6, "width": 128, "heads": 4, "context": SEGMENT}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "positions, no memory": {
        "rope": {"position": "rope"},
        "xl": {"position": "xl"},
        "xl, xl_width=32": {"position": "xl", "xl_width": 32},
    },
    "memory, position=xl, xl_width=32": {
        "full:512": {"memory": "full:512"},
        "last:1,long=512,short=64": {"memory": "last:1,long=512,short=64"},
        "full:0": {"memory": "full:0"},
    },
}


def step_of(options: dict[str, Any]) -> Callable[[], object]:
    """A forward and backward pass over one segment, the memory full."""
    config = ModelConfig(**(SIZE | {"position": "xl", "xl_width": 32} | options)) if "memory" in options else None
    model = Decoder(ModelConfig(**SIZE, **options) if config is None else config)
    tokens = torch.randint(0, 256, (ROWS, SEGMENT + 1), generator=torch.Generator().manual_seed(0))
    memory = None if config is None else model.new_memory(ROWS)
    if memory is not None:
        with torch.no_grad():
            for _ in range(-(-max(memory.lengths) // SEGMENT)):
                model(tokens[:, :-1], memory=memory)

    def step() -> None:
        logits = model(tokens[:, :-1], memory=memory)
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def main() -> None:
    """Print a table for each group."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for title, arms in GROUPS.items():
        steps = {name: step_of(options) for name, options in arms.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(asked.rounds + 1):
            for name, step in steps.items():
                began = time.process_time()
                step()
                if turn:  # the first round warms up
                    seconds[name].append(time.process_time() - began)
        first = seconds[next(iter(steps))]
        print(f"\n{title}   ({1000 * min(first):.0f} ms of CPU at best, load {os.getloadavg()[0]:.1f})")
        print(f"| {next(iter(steps))} = 1 | median | minimum |\n|---|---|---|")
        for name, taken in seconds.items():
            ratio = statistics.median(one / base for one, base in zip(taken, first, strict=True))
            print(f"| {name} | {ratio:.2f} | {min(taken) / min(first):.2f} |")


if __name__ == "__main__":
    main()
