"""`python -m benchmarks.length`: do linear mechanisms stay linear to 64k tokens, and from which length do they pay?

One process, one thread. A round times every mechanism at every length once, PyTorch's attention among them, so that a
busy machine slows all alike; the minimum over rounds is kept. Four things are said of each mechanism:

    operations   of the matrix products that really ran, counted; and the pairs of query and key that see each other
    time         CPU time per token, forward to 64k, forward and backward to 16k
    ratio        to scaled_dot_product_attention at the same length, and the length at which the two cross
    memory       growth of the resident set, inputs and all, in a process of its own

The mark to meet: time per token at 64k at most 1.3 times that at 8k.

    python -m benchmarks.length            # about five minutes
    python -m benchmarks.length --save     # and write benchmarks/results/length-cpu-DATE.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clearhead import AttentionSpec, attend
from clearhead.attention import laser, performer
from clearhead.attention.mask import Mask
from clearhead.bench import peak
from clearhead.bench.machine import cpu_model
from clearhead.kernels import chunked

HEADS, DIM = 2, 64
LENGTHS = tuple(1024 << i for i in range(7))
BOTH_WAYS_UP_TO = 16384
"""Longest length of forward and backward."""
MARK = 1.3
FEW = 2
"""Rounds of what is quadratic and longer than `BOTH_WAYS_UP_TO`."""


@dataclass(frozen=True)
class Mechanism:
    """What is timed; `spec` None is PyTorch's own attention."""

    name: str
    spec: str | None
    causal: bool = True
    longest: int = LENGTHS[-1]

    @property
    def baseline(self) -> str:
        """The quadratic attention that sees the same way."""
        return "sdpa causal" if self.causal else "sdpa"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
        if self.spec is None:
            return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attend(q, k, v, self.spec, mask=self.mask, backend=backend).out

    @property
    def backend(self) -> str:
        """What serves long inputs; a short one (bigbird below twice its keys) may go to PyTorch's kernel."""
        return "linear" if (self.spec or "").startswith("performer") else "chunked"

    @property
    def mask(self) -> Mask:
        """What the caller gives; the pattern adds its own."""
        return Mask.causal() if self.causal else Mask()


MECHANISMS = (
    Mechanism("sdpa causal", None),
    Mechanism("sdpa", None, causal=False, longest=16384),
    Mechanism("performer causal", "performer"),
    Mechanism("performer", "performer", causal=False),
    Mechanism("bigbird causal", "bigbird"),
    Mechanism("bigbird", "bigbird", causal=False),
    Mechanism("window:256 causal", "window:256"),
    Mechanism("laser+window:256 causal", "laser+window:256"),
    Mechanism("self_adjust+window:256 causal", "self_adjust+window:256"),
)
LINEAR = tuple(one for one in MECHANISMS if one.spec is not None)


def inputs(length: int, *, heads: int = HEADS, dim: int = DIM, gradient: bool = False) -> list[Tensor]:
    """Query, key and value, [1, heads, length, dim], entries of variance 1/4."""
    generator = torch.Generator().manual_seed(length)
    return [(torch.randn(1, heads, length, dim, generator=generator) / 2).requires_grad_(gradient) for _ in range(3)]


# ---- operations ----


def operations(mechanism: Mechanism, length: int, *, heads: int = 1, dim: int = DIM) -> int:
    """Operations of the matrix products of one forward pass, counted as they run (2 a multiply-add).

    PyTorch's counter does not look into operators of others, so ours are taken as the plain functions they are made of.
    """

    def opened(module: Any, name: str) -> Any:
        return mock.patch.object(module, name, getattr(module, name)._init_fn)

    tensors = inputs(length, heads=heads, dim=dim)
    with (
        torch.no_grad(),
        opened(performer, "linear_forward"),
        opened(chunked, "chunked_forward"),
        opened(laser, "chunked_forward"),
        opened(laser, "laser_forward"),
        FlopCounterMode(display=False) as counter,
    ):
        mechanism(*tensors, backend=mechanism.backend)
    return int(counter.get_total_flops())


def visible_pairs(mechanism: Mechanism, length: int) -> int | None:
    """Pairs of query and key of one head that see each other; None where there are no pairs."""
    if mechanism.spec is None or mechanism.backend == "linear":
        return None
    mask = AttentionSpec.parse(mechanism.spec).pattern.within(mechanism.mask, 1, length)
    return int(mask.visible_count(length, length, "cpu").sum())


def bends(lengths: Sequence[int], counts: Sequence[int]) -> list[float]:
    """How far each count lies from the straight line through the first two: all 0 for a count exactly linear.

    Exactly linear is `slope * length + constant`: the constant is what the first and the last tokens lack or have more.
    """
    slope = Fraction(counts[1] - counts[0], lengths[1] - lengths[0])
    return [
        float(count - counts[0] - slope * (length - lengths[0])) for length, count in zip(lengths, counts, strict=True)
    ]


# ---- time ----


def interleaved(rounds: int, *, backward: bool) -> dict[str, dict[int, list[float]]]:
    """CPU seconds of every mechanism at every length, once a round."""
    lengths = [n for n in LENGTHS if not backward or n <= BOTH_WAYS_UP_TO]
    times: dict[str, dict[int, list[float]]] = {one.name: {} for one in MECHANISMS}
    for turn in range(rounds + 1):  # the first warms up, where that is cheap
        for length in lengths:
            tensors = inputs(length, gradient=backward)
            for one in MECHANISMS:
                slow = one.spec is None and length > BOTH_WAYS_UP_TO
                if length > one.longest or (slow and not 1 <= turn <= FEW):
                    continue
                seconds = _timed(one, tensors, backward)
                if turn:
                    times[one.name].setdefault(length, []).append(seconds)
    return times


def _timed(mechanism: Mechanism, tensors: list[Tensor], backward: bool) -> float:
    began = time.process_time()
    if backward:
        out = mechanism(*tensors)
        out.backward(torch.ones_like(out))
    else:
        with torch.no_grad():
            mechanism(*tensors)
    taken = time.process_time() - began
    for t in tensors:
        t.grad = None
    return taken


def crossing(own: dict[int, float], other: dict[int, float]) -> str:
    """From which length the first is the faster one, between two that were measured by the logarithms."""
    lengths = sorted(own.keys() & other.keys())
    ratios = [math.log(own[n] / other[n]) for n in lengths]
    if ratios[0] <= 0.0:
        return f"below {lengths[0]}"
    for (a, high), (b, low) in zip(
        zip(lengths, ratios, strict=True), list(zip(lengths, ratios, strict=True))[1:], strict=False
    ):
        if high > 0.0 >= low:
            share = high / (high - low)
            return f"{a * (b / a) ** share:.0f}"
    return f"above {lengths[-1]}"


# ---- memory ----


def resident_growth(mechanism: Mechanism, length: int, *, backward: bool) -> int | None:
    """Bytes by which a process grows by inputs and one pass over them; None where Linux does not tell.

    To be asked before anything large was computed here: the process is a fork, and would use up the holes in its heap.
    """
    if not peak.possible():
        return None
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_grow, args=(mechanism, length, backward, send))
    child.start()
    child.join()
    return int(receive.recv()) if receive.poll() else None


def _grow(mechanism: Mechanism, length: int, backward: bool, send: Any) -> None:
    _timed(mechanism, inputs(128, gradient=backward), backward)
    send.send(peak.risen(lambda: _timed(mechanism, inputs(length, gradient=backward), backward)))


# ---- the report ----


def summary(rounds: int) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    found: dict[str, Any] = {one.name: {} for one in MECHANISMS}
    for one in LINEAR:
        for backward, label in ((False, "memory_forward"), (True, "memory_both")):
            sizes = [n for n in LENGTHS if n >= 4096 and (not backward or n <= BOTH_WAYS_UP_TO)]
            found[one.name][label] = {n: resident_growth(one, n, backward=backward) for n in sizes}
    for one in LINEAR:
        counted = [operations(one, n) for n in LENGTHS]
        pairs = [visible_pairs(one, n) for n in LENGTHS]
        found[one.name] |= {
            "operations_per_head": dict(zip(LENGTHS, counted, strict=True)),
            "operations_off_the_line": bends(LENGTHS, counted),
        }
        if None not in pairs:
            known = [int(x or 0) for x in pairs]
            found[one.name] |= {
                "visible_pairs_per_head": dict(zip(LENGTHS, known, strict=True)),
                "pairs_off_the_line": bends(LENGTHS, known),
            }
    for backward, label in ((False, "forward"), (True, "both")):
        times = interleaved(rounds, backward=backward)
        least = {name: {n: min(x) for n, x in own.items()} for name, own in times.items()}
        for one in MECHANISMS:
            own, base = least[one.name], least[one.baseline]
            found[one.name][label] = {
                "rounds": {n: len(x) for n, x in times[one.name].items()},
                "microseconds_per_token": {n: 1e6 * x / n for n, x in own.items()},
                "ratio_to_sdpa": {n: x / base[n] for n, x in own.items() if n in base},
                "crossing": crossing(own, base) if one.spec is not None else None,
            }
            if not backward and one.spec is not None:
                found[one.name]["time_per_token_64k_over_8k"] = (own[65536] / 65536) / (own[8192] / 8192)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [
        f"CPU time per token and forward pass in microseconds, {HEADS} heads of {DIM}, one thread:",
        "",
        f"| mechanism | {' | '.join(_short(n) for n in LENGTHS)} | 64k / 8k | crosses sdpa at | forward + backward |",
        f"|---|{'---|' * (len(LENGTHS) + 3)}",
    ]
    for name, own in found.items():
        per_token = own["forward"]["microseconds_per_token"]
        cells = [f"{per_token[n]:.1f}" if n in per_token else "-" for n in LENGTHS]
        factor = own.get("time_per_token_64k_over_8k")
        cells += [
            "-" if factor is None else f"{factor:.2f}",
            own["forward"]["crossing"] or "-",
            own["both"]["crossing"] or "-",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Time as a ratio to sdpa, forward; forward + backward:", ""]
    lines += [f"| mechanism | {' | '.join(_short(n) for n in LENGTHS)} |", f"|---|{'---|' * len(LENGTHS)}"]
    for one in LINEAR:
        shown = []
        for n in LENGTHS:
            pair = [found[one.name][label]["ratio_to_sdpa"].get(n) for label in ("forward", "both")]
            shown.append("; ".join("-" if x is None else f"{x:.2f}" for x in pair))
        lines.append(f"| {one.name} | {' | '.join(shown)} |")
    lines += [
        "",
        "| mechanism | operations per token and head | off the line | visible pairs per token | off the line "
        "| MB per 1k tokens, forward at 16k, 64k | forward + backward at 16k |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in LINEAR:
        own = found[one.name]
        step = LENGTHS[-1] - LENGTHS[-2]
        cells = []
        for name, off in (
            ("operations_per_head", "operations_off_the_line"),
            ("visible_pairs_per_head", "pairs_off_the_line"),
        ):
            if name in own:
                cells += [
                    f"{(own[name][LENGTHS[-1]] - own[name][LENGTHS[-2]]) / step:g}",
                    f"{max(map(abs, own[off])):g}",
                ]
            else:
                cells += ["-", "-"]
        forward, both = own["memory_forward"], own["memory_both"]
        cells.append(", ".join(_per_thousand(forward[n], n) for n in (16384, 65536)))
        cells.append(_per_thousand(both[16384], 16384))
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return lines


def _per_thousand(size: int | None, length: int) -> str:
    return "-" if size is None else f"{size / length * 1024 / 2**20:.2f}"


def _short(length: int) -> str:
    return f"{length // 1024}k"


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/length-cpu-DATE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    found = summary(arguments.rounds)
    print("\n".join(table(found)))
    for one in LINEAR:
        factor = found[one.name]["time_per_token_64k_over_8k"]
        print(f"{one.name}: {factor:.2f}, {'within' if factor <= MARK else 'ABOVE'} {MARK}")
    if arguments.save:
        date = datetime.date.today().isoformat()
        path = Path(__file__).parent / "results" / f"length-cpu-{date}.json"
        about = {
            "date": date, "torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_model(),
            "threads": 1, "heads": HEADS, "head_dim": DIM, "load_at_start": load,
        }  # fmt: skip
        path.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
