"""The needle: in a text eight times as long as what a token sees, a reader must name the class of one token.

64 blocks of 4 tokens are noise, but for the reader in the middle and the needle, one of 8 classes, in a block that is
neither global nor nearer to the reader than a quarter of the text. Legend: b sequences, t tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.models.config import ModelConfig
from clearhead.models.encoder import Encoder
from clearhead.models.make import build_model

BLOCK, BLOCKS = 4, 64
TOKENS = BLOCK * BLOCKS
READER_AT = TOKENS // 2
CLASSES, NOISE = 8, 16
READER = CLASSES + NOISE
VOCABULARY = READER + 1
"""Token ids: the needles, then the noise, then the reader."""
LAYERS, WIDTH, HEADS, BATCH, RATE = 2, 32, 2, 16, 2e-3
EVERY, LOOK, FINAL = 100, 256, 2048
"""Steps between looks; fresh sequences of a look, and of the last one."""

PATTERNS = {
    "full": "softmax",
    "window + global + random": f"bigbird:block_size={BLOCK},random_blocks=3",
    "window + global": f"bigbird:block_size={BLOCK},random_blocks=0",
    "window + random": f"bigbird:block_size={BLOCK},global_blocks=0,random_blocks=3",
    "window": f"bigbird:block_size={BLOCK},global_blocks=0,random_blocks=0",
}


@dataclass(frozen=True)
class Job:
    """One run; it ends when all sequences of a look are right."""

    pattern: str
    seed: int
    steps: int

    @property
    def attention(self) -> str:
        """The spec, with random blocks of this seed."""
        spec = PATTERNS[self.pattern]
        return f"{spec},seed={self.seed}" if "random_blocks=3" in spec else spec


def allowed() -> Tensor:
    """Places where a needle may stand."""
    place = torch.arange(TOKENS)
    inner = (place >= BLOCK) & (place < TOKENS - BLOCK)
    return place[inner & ((place - READER_AT).abs() >= TOKENS // 4)]


def draw(sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [b, t] and the class of each needle [b]."""
    tokens_bt = torch.randint(CLASSES, CLASSES + NOISE, (sequences, TOKENS), generator=generator)
    class_b = torch.randint(0, CLASSES, (sequences,), generator=generator)
    places = allowed()
    at_b = places[torch.randint(0, len(places), (sequences,), generator=generator)]
    tokens_bt[torch.arange(sequences), at_b] = class_b
    tokens_bt[:, READER_AT] = READER
    return tokens_bt, class_b


def answers(model: Encoder, tokens_bt: Tensor) -> Tensor:
    """Logits of the classes at the reader, [b, 8]."""
    return model.logits(model.hidden(tokens_bt)[:, READER_AT])[:, :CLASSES]


@torch.no_grad()
def accuracy(model: Encoder, seed: int, sequences: int) -> float:
    """Share of right answers on fresh sequences."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for _ in range(sequences // 64):
        tokens_bt, class_b = draw(64, generator)
        right += int((answers(model, tokens_bt).argmax(-1) == class_b).sum())
    model.train()
    return right / sequences


def train_one(job: Job) -> dict[str, Any]:
    """Train with Adam at a constant rate; return the curve and the accuracy at the end."""
    torch.set_num_threads(1)
    began = time.process_time()
    model = build_model(
        ModelConfig(
            architecture="encoder",
            vocab_size=VOCABULARY,
            context=TOKENS,
            layers=LAYERS,
            width=WIDTH,
            heads=HEADS,
            attention=job.attention,
            position="learned",
            feed_forward="relu",
            init="xavier",
            tie_embeddings=False,
        ),
        seed=job.seed,
    )
    assert isinstance(model, Encoder)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(job.seed)
    look, final = (LOOK, FINAL) if job.steps >= EVERY else (64, 64)
    curve: list[tuple[int, float]] = []
    for step in range(1, job.steps + 1):
        tokens_bt, class_b = draw(BATCH, generator)
        loss = F.cross_entropy(answers(model, tokens_bt), class_b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == job.steps:
            curve.append((step, accuracy(model, 50_000 + 1000 * job.seed + step, look)))
            if curve[-1][1] == 1.0:
                break
    return {
        "pattern": job.pattern,
        "seed": job.seed,
        "budget": job.steps,
        "curve": curve,
        "accuracy": accuracy(model, 90_000 + job.seed, final),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
