"""At initialisation: token correlation by depth, its fixed points under dropout, and weak and strong attention scores.

Every number comes twice, from `signal.predict` (of the model's own weight variances, or of the config) and from
`signal.measure`. An encoder in train mode: ReLU, LayerNorm, token, position and segment tables, Zipf's law over the
vocabulary, two segments with a uniform cut.

Legend: b batch, t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clearhead.init.embedding_correlation import batch_repetition
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.describe import describe
from clearhead.signal.measurement import measure
from clearhead.signal.prediction import predict_skeleton
from clearhead.signal.trace import Trace

WIDTH, HEADS, TOKENS, ROWS, VOCABULARY = 128, 4, 64, 4, 1000
ARMS = {
    "standard, Pre-LN": ("standard", "pre"),
    "Xavier, Pre-LN": ("xavier", "pre"),
    "Xavier, Post-LN": ("xavier", "post"),
    "DeepScaleLM, Pre-LN": ("deepscale", "pre"),
    "DeepScaleLM, Post-LN": ("deepscale", "post"),
}
DROPOUTS = (0.0, 0.1)
FIXED_POINTS = {0.0: 1.0, 0.05: 0.912, 0.1: 0.835, 0.2: 0.700, 0.3: 0.583}
"""Dropout -> where the published recursion comes to rest (derived by us)."""
FIXED_POINT_LAYERS, FIXED_POINT_K = 48, 12.0
"""beta^2 = 12 / 48: what the first stream brought is down to e^-12 at the end, so the recursion is at rest."""
STRENGTHS = (0.25, 1.0, 2.0, 4.0)
"""Standard deviation of the scores of a stream of variance 1 without correlation."""
SCORE_LAYERS = 24


@dataclass(frozen=True)
class Job:
    """One model: which arm, how deep, how much dropout, how strong its scores, how much its branches weigh."""

    kind: str
    """correlation | fixed point | scores"""
    arm: str
    layers: int
    dropout: float
    seed: int
    strength: float = 1.0
    k: float = 2.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from all others."""
        return (self.kind, self.arm, self.layers, self.dropout, self.seed, self.strength, self.k)


def jobs(seeds: int, depths: tuple[int, ...] = (24, 96), deepest: int = 192) -> list[Job]:
    """Everything that is measured at initialisation."""
    answer = []
    for seed in range(seeds):
        for dropout in DROPOUTS:
            answer += [Job("correlation", arm, layers, dropout, seed) for layers in depths for arm in ARMS]
            answer.append(Job("correlation", "DeepScaleLM, Pre-LN", deepest, dropout, seed))
        answer += [
            Job("fixed point", "DeepScaleLM, Pre-LN", FIXED_POINT_LAYERS, dropout, seed, k=FIXED_POINT_K)
            for dropout in FIXED_POINTS
        ]
        answer += [
            Job("scores", arm, min(depths), 0.1, seed, strength=strength)
            for arm in ("Xavier, Pre-LN", "DeepScaleLM, Pre-LN", "Xavier, Post-LN")
            for strength in STRENGTHS
        ]
    return answer


def config_of(job: Job) -> ModelConfig:
    """The encoder of a job."""
    init, placement = ARMS[job.arm]
    return ModelConfig(
        architecture="encoder",
        vocab_size=VOCABULARY,
        context=TOKENS,
        layers=job.layers,
        width=WIDTH,
        heads=HEADS,
        feed_forward="relu",
        norm="layer",
        position="learned",
        segment_types=2,
        dropout=job.dropout,
        init=init,
        norm_placement=placement,
        deepscale_k=job.k,
    )


def strengthen(model: torch.nn.Module, strength: float) -> None:
    """Multiply queries and keys, so that scores of standard deviation 1 get `strength`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.query.weight", "attention.key.weight")):
                parameter.mul_(strength**0.5)


def batch_of(seed: int) -> dict[str, Tensor]:
    """Tokens and segments, [b, t]."""
    generator = torch.Generator().manual_seed(seed)
    p = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    tokens_bt = torch.multinomial(p / p.sum(), ROWS * TOKENS, True, generator=generator).reshape(ROWS, TOKENS)
    cut_b1 = torch.randint(0, TOKENS + 1, (ROWS, 1), generator=generator)
    return {"tokens": tokens_bt, "segment_types": (torch.arange(TOKENS) >= cut_b1).long()}


def measure_one(job: Job) -> dict[str, Any]:
    """Measure and predict one model; lists run over the layers, correlations from the first stream to the last."""
    torch.set_num_threads(1)
    batch = batch_of(job.seed)
    model = build_model(config_of(job), job.seed).train()
    scores = job.kind == "scores"
    if scores:
        strengthen(model, job.strength)
    draw = torch.Generator().manual_seed(job.seed)
    taps = ("input", "output", "branch", *(("attention",) if scores else ()))
    measured = measure(
        model,
        batch,
        loss=lambda output, _: (output * torch.randn(output.shape, generator=draw)).sum(),
        backward=scores,
        taps=taps,
        seed=job.seed,
    )
    skeleton = describe(
        model,
        tokens=TOKENS,
        repetition=batch_repetition(batch["tokens"].numpy()),
        segment_repetition=batch_repetition(batch["segment_types"].numpy()),
    )
    if scores:
        seen = measured["encoder.output"].backward
        assert seen is not None
        predicted = predict_skeleton(skeleton, output_gradient=seen, sequences=ROWS)
    else:
        predicted = predict_skeleton(skeleton)
    answer = {
        "kind": job.kind,
        "arm": job.arm,
        "layers": job.layers,
        "dropout": job.dropout,
        "seed": job.seed,
        "strength": job.strength,
        "k": job.k,
    }
    for name, trace in (("measured", measured), ("predicted", predicted)):
        answer[name] = {"correlation": correlations(trace, "encoder")} | (attention_of(trace) if scores else {})
    return answer


def correlations(trace: Trace, stack: str) -> list[float]:
    """Token correlation of the stream before each layer and at the end."""
    places = [tap for tap in trace.stream(stack) if tap.part in ("attention", "output")]
    return [round(tap.forward.correlation, 5) for tap in places if tap.forward is not None]


def attention_of(trace: Trace) -> dict[str, list[float]]:
    """Statistics of each layer's attention, and the gradient of its query matrix over that of its value matrix."""
    answer: dict[str, list[float]] = {
        name: [] for name in ("score_variance", "entropy", "largest_weight", "jacobian_gain", "query_over_value")
    }
    for tap in trace.at("branch", "attention"):
        stats = tap.attention
        if stats is None:
            continue
        answer["score_variance"].append(_short(stats.score_variance))
        answer["entropy"].append(_short(stats.entropy / stats.uniform_entropy))
        answer["largest_weight"].append(_short(stats.largest_weight))
        answer["jacobian_gain"].append(_short(stats.jacobian_gain))
        if tap.matrix_gradients:
            answer["query_over_value"].append(_short(tap.matrix_gradients["query"] / tap.matrix_gradients["value"]))
    return answer


def _short(value: float) -> float:
    return float(f"{value:.5g}")
