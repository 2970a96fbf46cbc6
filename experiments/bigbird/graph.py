"""The pattern as a graph of blocks: how far information must walk, and what a number of layers can reach at most."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from clearhead.attention.bigbird import BlockLayout, key_blocks
from clearhead.attention.spec import AttentionSpec, BigBird
from experiments.bigbird import needle

Bools = npt.NDArray[np.bool_]


def sees(attention: str, blocks: int, heads: int, block: int) -> Bools:
    """[blocks, blocks]: whether a query block sees a key block in some head, both ways."""
    if attention == "softmax":
        return np.ones((blocks, blocks), bool)
    pattern = AttentionSpec.parse(attention).pattern
    assert isinstance(pattern, BigBird)
    layout = BlockLayout(
        block, pattern.global_blocks, pattern.window_blocks, pattern.random_blocks, pattern.seed, 0, False, False
    )
    seen = np.zeros((blocks, blocks), bool)
    for head in range(heads):
        for row in range(blocks):
            seen[row, key_blocks(layout, row, head, blocks)] = True
    return seen


def diameter(seen: Bools) -> int | None:
    """The longest of the shortest walks along what a query sees; None if some block is never met."""
    longest = 0
    neighbours = [np.flatnonzero(row) for row in seen]
    for start in range(len(seen)):
        steps = {start: 0}
        queue = deque([start])
        while queue:
            here = queue.popleft()
            for there in neighbours[here].tolist():
                if there not in steps:
                    steps[there] = steps[here] + 1
                    queue.append(there)
        if len(steps) < len(seen):
            return None
        longest = max(longest, max(steps.values()))
    return longest


def ceiling(job: needle.Job) -> float:
    """The best expected accuracy: 1 for needles that reach the reader through the layers, chance for the others."""
    seen = sees(job.attention, needle.BLOCKS, needle.HEADS, needle.BLOCK)
    reached = np.zeros(needle.BLOCKS, bool)
    reached[needle.READER_AT // needle.BLOCK] = True
    for _ in range(needle.LAYERS):
        reached = np.asarray(seen[reached].any(axis=0))
    share = float(reached[needle.allowed().numpy() // needle.BLOCK].mean())
    return share + (1.0 - share) / needle.CLASSES


def diameters(blocks: tuple[int, ...], seeds: range) -> list[dict[str, object]]:
    """By pattern and number of blocks, one head: the diameter of each seed's graph."""
    answer = []
    for name, spec in needle.PATTERNS.items():
        if name == "full":
            continue
        for count in blocks:
            found = [
                diameter(sees(needle.Job(name, seed, 0).attention, count, 1, needle.BLOCK))
                for seed in (seeds if "random_blocks=3" in spec else range(1))
            ]
            answer.append({"pattern": name, "blocks": count, "diameters": found})
    return answer
