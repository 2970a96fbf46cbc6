"""What one arm's parts cost on this machine: `python -m clearhead.compare.pilot FOLDER ARM OUT`, one process an arm.

`FOLDER` holds a plan.json. The process trains for a moment by the loop that trains everything, scores a piece of the
validation text (the test text is left alone) and saves once. Its start is what its caller waited beyond that.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clearhead.compare.plan import ComparePlan
from clearhead.compare.pool import write_json
from clearhead.errors import UserError

WARM_UP = 2
SECONDS, LEAST_STEPS, MOST_STEPS = 2.0, 5, 200
"""It takes steps for so long, but so many at least and at most."""
SCORED_TOKENS = 8_192


def measure(plan: ComparePlan, name: str) -> dict[str, float]:
    """Return the seconds of a step, of scoring validation and the test text once, of a checkpoint; and of all this."""
    from clearhead.train.loop import Run
    from clearhead.train.world import World

    config = plan.arm(name).apply(plan.base)
    train = dataclasses.replace(config.train, steps=10_000, tokens=None, seed=0)
    with World.join(train) as world, tempfile.TemporaryDirectory() as scratch:
        run = Run(dataclasses.replace(config, train=train), Path(scratch), world, None, False)
        began = time.perf_counter()
        for _ in range(WARM_UP):
            run.advance(False)
        steps, first = 0, time.perf_counter()
        while steps < LEAST_STEPS or (steps < MOST_STEPS and time.perf_counter() - first < SECONDS):
            run.advance(False)
            steps += 1
        stepped = time.perf_counter()
        result = run._evaluate("val", min(SCORED_TOKENS, train.eval_tokens), lambda: False)
        scored = time.perf_counter()
        run.save()
        saved = time.perf_counter()
        run.recorder.close()
        per_token = (scored - stepped) / _tokens_of(result)
        return {
            "step": (stepped - first) / steps,
            "evaluation": per_token * train.eval_tokens,
            "test": per_token * (train.test_tokens or _test_tokens(run)),
            "checkpoint": saved - scored,
            "inner": saved - began,
        }


def _tokens_of(result: Any) -> int:
    """Tokens that a score has read: of text, or of the sequences of a generated task."""
    return int(result.tokens if hasattr(result, "tokens") else result.sequences * result.context)


def _test_tokens(run: Any) -> int:
    if run.config.data.synthetic is not None:
        return int(run.data.task.sequences * run.data.length)
    return int(run.data.summary["splits"]["test"]["tokens"])


if __name__ == "__main__":
    try:
        write_json(Path(sys.argv[3]), measure(ComparePlan.load(Path(sys.argv[1])), sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
