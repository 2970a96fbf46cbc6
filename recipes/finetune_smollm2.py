"""Selective temperatures on SmolLM2-135M with one GPU: `python -m recipes.finetune_smollm2 [lora|full|temperature]`.

The same comparison as `clearhead compare --model smollm2` at the size of a GPU: softmax fine-tuned alike, selective
temperatures, plain learned ones; five seeds of 2,000 steps of 16 windows of 1,024 tokens (33 million tokens a run), the
whole test text scored. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clearhead.compare.arms import Arm
from clearhead.compare.plan import FINETUNE, FINETUNE_ATTENTION, ComparePlan
from clearhead.train.finetune import RATES, finetune_config

STEPS, CONTEXT, BATCH = 2_000, 1_024, 16


def plan(
    tune: str = "lora",
    *,
    model: str = "smollm2",
    data: str = "shakespeare",
    attention: tuple[str, ...] = FINETUNE_ATTENTION,
    seeds: int = 5,
    steps: int = STEPS,
    context: int = CONTEXT,
    batch: int = BATCH,
) -> ComparePlan:
    """The comparison with LoRA on every matrix, every parameter, or the temperatures alone (without softmax then)."""
    if tune == "temperature":  # plain softmax has nothing to learn; the plain learned temperature is the baseline
        attention = tuple(spec for spec in reversed(attention) if "selective" in spec or "learned" in spec)
    lora = {"lora_rank": 16, "lora_alpha": 32.0, "lora_targets": "all-linear"} if tune == "lora" else {}
    base = finetune_config(
        model,
        attention=attention[0],
        tune=tune,
        data=data,
        context=context,
        steps=steps,
        model={**lora, "gradient_checkpointing": True},
        optim={"lr": RATES[tune].lr, "warmup_steps": steps // 20},
        train={
            "batch_size": batch,
            "grad_accum": 2 if batch % 2 == 0 else 1,
            "precision": "bf16",
            "eval_every": max(1, steps // 10),
            "eval_tokens": 65_536,
            "test_tokens": None,
            "checkpoint_every": max(1, steps // 4),
        },
    )
    arms = tuple(map(Arm.of_attention, attention))
    return ComparePlan(base=base, arms=arms, baseline=arms[0].name, seeds=tuple(range(seeds)), preset=FINETUNE)


def main() -> None:
    """Carry one out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tune", nargs="?", default="lora", choices=list(RATES))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    from clearhead.compare.run import compare

    compare(plan(asked.tune, model=asked.model, data=asked.data), asked.out or Path(f"runs/finetune-{asked.tune}"))


if __name__ == "__main__":
    main()
