"""Peak memory of one operation, each in a process of its own.

`python -m clearhead.bench.peak` is a server that imports everything, and then forks for each question, so that every
measurement starts from the same clean process without paying for the imports again. In the fork: inputs (and model)
are made, the kernel's high-water mark of resident memory is set back, the operation runs once, and what the mark rose
by is the answer. It holds outputs, gradients, optimizer state and everything in between, and no inputs or weights. On a
GPU the bench asks torch's own allocator instead, in its own process.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clearhead.attention.spec import AttentionSpec
from clearhead.bench.plan import MODELS, Group, Model, Shape
from clearhead.bench.registry import Competitor

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SMALL = 32
"""Tokens of the run that loads kernels before the measured one."""


def possible() -> bool:
    """Whether this system lets a process set its high-water mark back (Linux)."""
    return CLEAR.exists() and hasattr(os, "fork")


class PeakServer:
    """Answers how much memory an operation takes; use it in a `with` block."""

    def __init__(self, packages: Sequence[str]) -> None:
        # Tensors get pages of their own, which go back when they die: no old hole in the heap hides a new tensor.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | malloc
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clearhead.bench.peak", *packages],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._said.close()

    def ask(self, group: Group, one: Competitor, seed: int) -> int | None:
        """Bytes that one run takes; None where the process was killed, as one that needs too much memory is.

        Raises `RuntimeError` when it failed in any other way.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        on = dataclasses.asdict(group.on) if isinstance(group.on, Shape) else group.on.name
        question = {"operation": group.operation, "on": on, "competitor": dataclasses.asdict(one), "seed": seed}
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._said.seek(0)
            words = (self._said.read().strip().splitlines() or ["no word"])[-1]
            raise RuntimeError(f"peak memory: the process that measures it has ended: {words}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise RuntimeError(f"peak memory of {one.name}: {answer}")
        return answer


def measure(question: dict[str, Any]) -> int:
    """Bytes by which the resident set rises over what it was before the operation; in this very process."""
    from clearhead.bench.contest import Contest

    given = question["competitor"]
    one = Competitor(**{**given, "operations": tuple(given["operations"])})
    on = Shape(**question["on"]) if isinstance(question["on"], dict) else MODELS[question["on"]]
    group = Group(question["operation"], on, (one,))
    small: Shape | Model
    if isinstance(on, Shape):
        small = dataclasses.replace(on, length=min(on.length, SMALL))
    else:
        small = dataclasses.replace(on, batch_size=1, config=dataclasses.replace(on.config, context=SMALL))
    Contest(dataclasses.replace(group, on=small), question["seed"]).build(one)
    run = Contest(group, question["seed"]).build_only(one)
    gc.collect()
    return max(0, risen(run))


def risen(run: Callable[[], object]) -> int:
    """Bytes by which this process's resident set rises at most while `run` runs (Linux, see `possible`)."""
    CLEAR.write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def serve(packages: Sequence[str]) -> None:
    """Answer questions from stdin, each in a fork, until it ends."""
    import torch

    torch.set_num_threads(1)
    AttentionSpec.parse("softmax")
    importlib.import_module("clearhead.models.decoder")
    importlib.import_module("clearhead.train.step")
    for name in packages:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answer: int | str = "it did not say why"
            try:
                answer = measure(json.loads(line))
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            finally:
                os.write(writer, json.dumps(answer).encode())
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer_text = pipe.read()
        os.waitpid(child, 0)
        print(answer_text or "null", flush=True)


PACKAGES = {
    "x-transformers": "x_transformers",
    "transformers": "transformers.models.llama.modeling_llama",
}
"""What the server imports before it forks, by source."""

if __name__ == "__main__":
    serve(sys.argv[1:])
