"""One score without training, and one run of training, of a pretrained model under a given attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.train.config import RunConfig
from clearhead.train.finetune import finetune_config


@dataclass(frozen=True)
class Job:
    """Everything that decides a result."""

    model: str
    data: str
    attention: str
    seed: int = 0
    steps: int = 0
    """0 = score it as it is."""
    context: int = 256
    batch: int = 1
    tokens: int = 2048
    """Of the test text that are scored."""
    eval_every: int = 20
    precision: str = "bf16"
    out: str = ""
    """Folder of the runs."""

    def config(self) -> RunConfig:
        """The run that trains it: LoRA on every matrix, the same for each attention."""
        steps = max(1, self.steps)
        return finetune_config(
            self.model,
            attention=self.attention,
            data=self.data,
            context=self.context,
            steps=steps,
            model={"lora_targets": "all-linear"},
            train={
                "seed": self.seed,
                "batch_size": self.batch,
                "precision": self.precision,
                "eval_every": self.eval_every,
                "eval_tokens": max(1, self.tokens // 2),
                "test_tokens": self.tokens,
                "checkpoint_every": self.eval_every,
                "threads": 1,
            },
        )


def zero_shot(job: Job) -> dict[str, Any]:
    """Score the test text with the pretrained weights under the job's attention, document by document."""
    from clearhead.data.text import prepare
    from clearhead.hf.model import Pretrained
    from clearhead.train.evaluate import evaluate

    config = job.config()
    # Nothing is trained, so nothing need be there to train.
    model = Pretrained.begin(dataclasses.replace(config.model, tune="full"))  # type: ignore[type-var]
    scored = evaluate(model, prepare(config.data), "test", max_tokens=job.tokens, batch_size=job.batch)
    return {
        "attention": job.attention,
        "bits_per_byte": scored.bits_per_byte,
        "nats_per_token": scored.nats_per_token,
        "tokens": scored.tokens,
        "documents": [document.to_dict() for document in scored.per_document],
    }


def recover(job: Job) -> dict[str, Any]:
    """Train, and return the validation curve and the test scores. Goes on with a run that was stopped."""
    from clearhead.train.loop import train

    name = job.attention.replace(":", "-").replace(",", "-").replace("=", "-")
    result = train(job.config(), Path(job.out) / "runs" / name / f"seed{job.seed}", progress=False)
    summary = result.summary
    return {
        "attention": job.attention,
        "seed": job.seed,
        "steps": job.steps,
        "status": result.status,
        "curve": [{key: point[key] for key in ("step", "bits_per_byte")} for point in summary["val_curve"]],
        "test_bits_per_byte": summary["test_bits_per_byte"],
        "documents": summary["test_documents"],
        "step_cpu_seconds": summary["step_cpu_seconds"]["median"],
        "trained": summary["parameters"]["trained"],
    }
