"""The formulas of `written_out.py` through `torch.compile`: what fusion by a compiler makes of them."""

from __future__ import annotations

import torch

from clearhead.bench.prepared import Attend, Problem
from clearhead.bench.sources import written_out


def attention(option: str, problem: Problem) -> Attend:
    """See `written_out.attention`; the first call compiles."""
    return torch.compile(written_out.attention(option, problem), dynamic=False)
