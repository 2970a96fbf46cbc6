"""Why a run repeats bit by bit, also when it was stopped in between.

The first weights are a function of (seed, parameter name) and the data of a step one of (seed, step). Every step seeds
torch's generators anew from (seed, step, rank), so there is no generator state to save or restore, and evaluating more
or less often changes nothing.

The rule for threads: a run uses `train.threads` of them in each operation; left open, torch's own number at the run's
first start, which its checkpoints keep. Sums on a CPU depend on that number in their last bits, so runs are bit-equal
for an equal number of threads (and an equal torch on an equal kind of processor). Comparisons set 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, which dropout draws from, as a function of the three numbers."""
    digest = hashlib.sha256(f"clearhead step {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def settings_put_back() -> Iterator[None]:
    """Leave the caller's number of threads and CPU generator as they were."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):  # to fork a GPU's generator too would wake every GPU
            yield
    finally:
        torch.set_num_threads(threads)
