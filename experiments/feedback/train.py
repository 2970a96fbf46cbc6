"""One short run on state tracking: blocks of 32 tokens, the memory carried from block to block.

The plain decoder is trained on the same blocks, each read together with the tokens before it that it can see through
all its layers, so that both models have the same past to look at.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clearhead.models.config import ModelConfig
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.make import build_model
from experiments.feedback.task import STATES, VOCABULARY, accuracy_by_band, draw

WINDOW, BLOCK, TOKENS = 8, 32, 128
CLIP = 1.0
"""Tokens seen back; tokens through which gradients flow; tokens of a stream in training and in scoring."""


@dataclass(frozen=True)
class Setup:
    """A model to be trained: `memory` is mix, embedding or last; a plain decoder has none."""

    architecture: str
    layers: int
    memory: str = "mix"

    @property
    def name(self) -> str:
        """How it is called in the table."""
        if self.architecture == "decoder":
            return f"decoder, {self.layers} layers"
        how = {"mix": "", "embedding": ", memory = embedding", "last": ", memory = last layer"}[self.memory]
        return f"feedback, {self.layers} layers{how}"

    @property
    def reach(self) -> int:
        """Tokens before a token that its output can hang on in a plain decoder: the window, once a layer."""
        return self.layers * WINDOW

    def config(self) -> ModelConfig:
        """The model. Both see `WINDOW` tokens besides the present one."""
        shape = {"vocab_size": VOCABULARY, "context": TOKENS, "width": 48, "heads": 2, "layers": self.layers}
        shape |= {"feed_forward": "relu", "init": "xavier", "tie_embeddings": False}
        if self.architecture == "decoder":
            return ModelConfig(attention=f"softmax+window:{WINDOW + 1}", position="rope", **shape)
        return ModelConfig(
            architecture="feedback", feedback_window=WINDOW, feedback_block=BLOCK, position="relative_key", **shape
        )


def run_one(setup: Setup, *, seed: int, steps: int, batch: int = 64, lr: float = 2e-3) -> dict[str, Any]:
    """Train with Adam and a cosine, then score fresh streams by steps since the last set."""
    began, cpu_began = time.perf_counter(), time.process_time()
    model = build_model(setup.config(), seed=seed + 1)
    if isinstance(model, FeedbackDecoder) and setup.memory != "mix":
        model.mix.hold(0 if setup.memory == "embedding" else setup.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    # A stream is read block by block; one step of the optimizer is one block. A decoder reads its past anew.
    state, at, streams = None, TOKENS, draw(batch, TOKENS, generator)
    for step in range(steps):
        if at == TOKENS:
            streams, at = draw(batch, TOKENS, generator), 0
            state = model.new_state(batch) if isinstance(model, FeedbackDecoder) else None
        first = max(at - setup.reach, 0) if state is None else at
        logits_btV = model(streams.tokens[:, first : at + BLOCK], state=state)[:, -BLOCK:, :STATES]
        targets_bt = streams.values[:, at : at + BLOCK].masked_fill(streams.since[:, at : at + BLOCK] < 0, -100)
        loss = F.cross_entropy(logits_btV.flatten(0, 1), targets_bt.flatten(), ignore_index=-100)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        at += BLOCK
    model.eval()
    fresh = draw(256, TOKENS, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        right_bt = model(fresh.tokens)[..., :STATES].argmax(dim=-1) == fresh.values
    shares = model.mix.shares().tolist() if isinstance(model, FeedbackDecoder) else None
    return {
        "model": setup.name,
        "seed": seed,
        "steps": steps,
        "loss": float(loss.detach()),
        "accuracy": accuracy_by_band(right_bt, fresh.since),
        "parameters": model.count_parameters()["total"],
        "shares": shares,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }
