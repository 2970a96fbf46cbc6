"""One run of the two-step recall: a decoder with some layout of memory, trained on streams, scored on others.

Legend: b rows, t tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from experiments.long_memory.task import BUCKETS, IGNORE, VOCABULARY, segments

ROWS, SEGMENT, STEPS, RATE, CLIP = 64, 16, 400, 3e-3, 0.5
SHORT, LONG = 4, 96
EVERY = 50
"""Steps between points of the curve."""
SCORED = 60
"""Segments of the scored streams; those before the memory is full do not count."""

LAYOUTS = {
    2: {
        "none": f"full:{SHORT}",
        "full": f"full:{LONG}",
        "first:1": f"first:1,long={LONG},short={SHORT}",
        "last:1": f"last:1,long={LONG},short={SHORT}",
    },
    3: {
        "full": f"full:{LONG}",
        "first:1": f"first:1,long={LONG},short={SHORT}",
        "middle": f"lengths:{SHORT}/{LONG}/{SHORT}",
        "last:1": f"last:1,long={LONG},short={SHORT}",
    },
}
"""By number of layers. "none" has short memories only."""


@dataclass(frozen=True)
class Job:
    """One run."""

    layers: int
    layout: str
    range: str
    seed: int
    steps: int = STEPS

    @property
    def memory(self) -> str:
        """The model's memory, as text."""
        return f"{LAYOUTS[self.layers][self.layout]},range={self.range}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run."""
        return (self.layers, self.layout, self.range, self.seed, self.steps)


def key_of_run(run: dict[str, Any]) -> tuple[Any, ...]:
    """See `Job.key`."""
    return (run["layers"], run["layout"], run["range"], run["seed"], run["steps"])


def config(job: Job) -> ModelConfig:
    """The model. Weights of about the size that attention needs to be uneven from the start: the short runs here do
    not leave the plateau from N(0, 0.02) and a tied table."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        context=SEGMENT,
        layers=job.layers,
        width=64,
        heads=2,
        feed_forward="relu",
        position="xl",
        init="xavier",
        embedding_norm=True,
        tie_embeddings=False,
        memory=job.memory,
    )


def train(job: Job) -> dict[str, Any]:
    """Train and score one run. All layouts of a seed start from the same weights and read the same streams."""
    torch.set_num_threads(1)
    model = Decoder(config(job))
    model.init_parameters(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    memory = model.new_memory(ROWS)
    began, curve, right, asked = time.process_time(), [], 0, 0
    for step, (tokens, answers, _) in enumerate(islice(segments(ROWS, SEGMENT, job.seed), job.steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / job.steps)) / 2
        logits = model(torch.from_numpy(tokens), memory=memory)
        wanted = torch.from_numpy(answers)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        right += int((logits.detach().argmax(-1) == wanted).sum())
        asked += int((wanted != IGNORE).sum())
        if (step + 1) % EVERY == 0 or step + 1 == job.steps:
            curve.append((step + 1, round(right / asked, 4)))
            right = asked = 0
    seconds = time.process_time() - began
    hits, counts = score(model, 1000 + job.seed)
    return {
        "layers": job.layers,
        "layout": job.layout,
        "range": job.range,
        "seed": job.seed,
        "steps": job.steps,
        "memory": model.config.memory,
        "parameters": model.count_parameters()["total"],
        "bytes_per_stream": memory.bytes // ROWS,
        "cpu_seconds": round(seconds, 1),
        "last_loss": round(float(loss.detach()), 4),
        "curve": curve,
        "accuracy": [round(hit / count, 4) for hit, count in zip(hits, counts, strict=True)],
        "asked": counts,
    }


@torch.no_grad()
def score(model: Decoder, seed: int) -> tuple[list[int], list[int]]:
    """Right answers and queries by bucket of distance, on fresh streams, once the memory is full."""
    memory = model.new_memory(ROWS)
    right, asked = [0] * len(BUCKETS), [0] * len(BUCKETS)
    for number, (tokens, answers, distances) in enumerate(islice(segments(ROWS, SEGMENT, seed), SCORED)):
        said = model(torch.from_numpy(tokens), memory=memory).argmax(-1).numpy()
        if number * SEGMENT < LONG:
            continue
        for index, (low, high) in enumerate(BUCKETS):
            here = (answers != IGNORE) & (distances >= low) & (distances < high)
            asked[index] += int(here.sum())
            right[index] += int((said == answers)[here].sum())
    return right, asked
