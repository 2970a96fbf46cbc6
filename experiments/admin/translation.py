"""An encoder-decoder on sentence pairs, with Admin and without it, by the package's own trainer.

All arms read the same pairs in the same order. The two Post-LN arms start from the same weights, number by number
(Xavier with query, key and value as one matrix, fairseq's default): they differ in omega alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clearhead.data.config import DataConfig
from clearhead.data.pairs import prepare_pairs
from clearhead.models.config import ModelConfig
from clearhead.signal.inspection import predict
from clearhead.signal.verdicts import judge, verdict_of
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train

ARMS: dict[str, dict[str, Any]] = {
    "Post-LN": {"norm_placement": "post", "init": "admin_constant", "output_change": "linear"},
    "Post-LN with Admin": {"norm_placement": "post", "init": "admin"},
    "Pre-LN": {"norm_placement": "pre", "init": "xavier"},
}
"""The declared difference. `output_change=linear` is omega = 1: plain Post-LN, drawn as Admin draws."""
RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    layers: int = 18
    width: int = 64
    steps: int = 400
    batch: int = 12
    warmup: int = 100
    context: int = 32
    vocabulary: int = 2048
    val_tokens: int = 2500
    test_tokens: int = 3000
    source: str = "verses-en-de"


SETTING = Setting()
QUICK = Setting(layers=2, width=32, steps=12, batch=4, warmup=4, val_tokens=200, test_tokens=200)


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    lr: float
    seed: int
    setting: Setting


def data_config(setting: Setting) -> DataConfig:
    """The pairs: German beside English, byte pairs learned from the training side."""
    return DataConfig(source=setting.source, tokenizer="bpe", vocab_size=setting.vocabulary, context=setting.context)


def model_config(arm: str, setting: Setting) -> ModelConfig:
    """`layers` encoder and `layers` decoder layers, ReLU, LayerNorm, learned positions, dropout 0.1."""
    return ModelConfig(
        architecture="seq2seq",
        vocab_size=setting.vocabulary,
        context=setting.context,
        layers=setting.layers,
        width=setting.width,
        heads=2,
        hidden=2 * setting.width,
        feed_forward="relu",
        norm="layer",
        position="learned",
        dropout=0.1,
        **ARMS[arm],
    )


def run_config(job: Job) -> RunConfig:
    """The published recipes where they fit: beta_2 0.98, label smoothing 0.1, no decay, no clipping, warm-up."""
    setting = job.setting
    return RunConfig(
        model=model_config(job.arm, setting),
        data=data_config(setting),
        optim=OptimConfig(lr=job.lr, warmup_steps=setting.warmup, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=None),
        train=TrainConfig(
            steps=setting.steps,
            batch_size=setting.batch,
            seed=job.seed,
            label_smoothing=0.1,
            eval_every=max(1, setting.steps // 8),
            eval_tokens=setting.val_tokens,
            test_tokens=setting.test_tokens,
            checkpoint_every=0,
            threads=1,
            device="cpu",
        ),
    )


def train_one(job: Job) -> dict[str, Any]:
    """Train, and keep what the README shows; a run that diverged is a result."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(run_config(job), folder, progress=False)
    found = result.summary
    return {
        "arm": job.arm,
        "lr": job.lr,
        "seed": job.seed,
        "status": result.status,
        "curve": [[point["step"], point["loss"]] for point in found["val_curve"]],
        "val": found["val_loss"],
        "test": found["test_nats_per_token"],
        "chrf": found.get("test_chrf"),
        "bleu": found.get("test_bleu"),
        "beams": found.get("test_beams"),
        "signature": found.get("test_chrf_signature"),
        "grad_norm": found["grad_norm"],
        "examples": (found.get("test_examples") or [])[:3],
        "fingerprint": found["data_fingerprint"],
        "seconds": found["wall_seconds"],
        "cpu_seconds": found["cpu_seconds"],
    }


def chosen_rates(tuning: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each arm's learning rate: the lowest loss on the validation pairs of the tuning seed."""
    best: dict[str, tuple[float, float]] = {}
    for run in tuning:
        loss = run["val"] if run["val"] is not None and run["status"] == "finished" else math.inf
        if run["arm"] not in best or loss < best[run["arm"]][0]:
            best[run["arm"]] = (loss, run["lr"])
    return {arm: lr for arm, (_, lr) in best.items()}


def frequency_loss(setting: Setting, split: str) -> float:
    """Nats per target token of a model that knows nothing but how often each token is: the plateau.

    Frequencies of the training targets, one added to each count, scored on the whole split.
    """
    data = prepare_pairs(data_config(setting))
    counts = np.ones(data.vocab_size)
    end = data.tokenizer.separator
    for _, target in data.pairs("train"):
        np.add.at(counts, target, 1)
        counts[end] += 1
    nats_V = -np.log(counts / counts.sum())
    rows = [np.append(target, end) for _, target in data.pairs(split)]
    return float(nats_V[np.concatenate(rows)].mean())


def expectations(setting: Setting) -> dict[str, dict[str, Any]]:
    """What `signal.predict` says of each arm before training: verdict and the sum of shares of each stack."""
    answer = {}
    for arm in ARMS:
        trace = predict(model_config(arm, setting), tokens=24)
        shares: dict[str, float] = {}
        for tap in trace.at("branch"):
            shares[tap.stack] = shares.get(tap.stack, 0.0) + (tap.share or 0.0)
        findings = judge(trace)
        answer[arm] = {
            "verdict": verdict_of(findings),
            "findings": [f"{f.stack}: {f.kind} ({f.severity}, {f.value:.3g})" for f in findings],
            "shares": shares,
        }
    return answer
