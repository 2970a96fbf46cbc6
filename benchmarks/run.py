"""`make bench`: attention and training-step time as a ratio to PyTorch's own attention.

One process, one thread, interleaved: each round times every contender once, so that a busy machine slows all alike. The
ratio is taken within a round; the table shows the median and the minimum over rounds. Absolute times are printed for
the baseline alone, with the load, because on a shared machine only the ratio means something.

    python -m benchmarks.run                      # attention, forward and backward, then a training step
    python -m benchmarks.run --rounds 15 --save   # and write benchmarks/results/cpu-DATE.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from clearhead import Temperatures, attend
from clearhead import functional as F
from clearhead.attention.mask import Mask

Run = Callable[[], object]


def written_out(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """What a paper's code does: the whole N x M matrix, each step an operation of its own."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    s = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    if form == "softmax":
        return s @ v
    if form == "laser":
        shift = v.detach().amax(dim=-2, keepdim=True)
        return (s @ (v - shift).exp()).log() + shift
    x = scores.masked_fill(~seen, 0.0)
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    return (x - low) / (high - low + 1e-10) * s @ v


def attention_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """Causal attention, forward and backward, on leaf tensors."""
    gradient = torch.randn_like(q)
    tau = torch.rand(*q.shape[:3], 1) + 0.5

    def both(forward: Callable[[], Tensor]) -> Run:
        return lambda: forward().backward(gradient)

    temperatures = Temperatures(query=tau, value=tau)
    return {
        "torch sdpa": both(lambda: torch_functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "softmax": both(lambda: F.softmax_attention(q, k, v, is_causal=True)),
        "laser": both(lambda: F.laser_attention(q, k, v, is_causal=True)),
        "softmax+selective": both(
            lambda: attend(q, k, v, "softmax+selective", mask=Mask.causal(), temperatures=temperatures).out
        ),
        "self_adjust": both(lambda: F.self_adjust_attention(q, k, v, is_causal=True)),
        "self_adjust detached": both(lambda: F.self_adjust_attention(q, k, v, is_causal=True, detach_extrema=True)),
        "softmax+window:256": both(lambda: attend(q, k, v, "softmax+window:256", mask=Mask.causal()).out),
        "softmax written out": both(lambda: written_out(q, k, v, "softmax")),
        "laser written out": both(lambda: written_out(q, k, v, "laser")),
        "self_adjust written out": both(lambda: written_out(q, k, v, "self_adjust")),
    }


def step_contenders(specs: list[str]) -> dict[str, Run]:
    """Whole training steps of the default comparison's kind of model: forward, loss, backward, AdamW."""
    from clearhead.models.config import ModelConfig
    from clearhead.models.decoder import Decoder
    from clearhead.objectives.causal_lm import causal_lm_loss

    tokens = torch.randint(0, 256, (16, 257), generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Run] = {}
    for spec in specs:
        model = Decoder(ModelConfig(vocab_size=257, context=256, layers=4, width=128, heads=4, attention=spec))
        model.init_parameters(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def step(model: Decoder = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            total, count = causal_lm_loss(model(tokens[:, :-1]), tokens[:, 1:])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        contenders[spec] = step
    return contenders


def measure(contenders: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Interleaved CPU times; ratios to the first contender of the same round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # warm-up
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    base = times[next(iter(times))]
    return {
        name: {
            "median_ratio": statistics.median(a / b for a, b in zip(own, base, strict=True)),
            "min_ratio": min(own) / min(base),
            "min_ms": min(own) * 1e3,
        }
        for name, own in times.items()
    }


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 9 for a figure to quote")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-DATE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "threads": 1,
        "rounds": arguments.rounds,
        "load_at_start": os.getloadavg(),
        "results": {},
    }
    shapes = [(1, 8, 512, 64), (1, 8, 1024, 64), (1, 4, 2048, 64), (16, 4, 256, 32)]
    groups = {
        f"attention forward+backward, causal fp32, b{b} h{h} n{n} d{d}": lambda b=b, h=h, n=n, d=d: (
            attention_contenders(*(torch.randn(b, h, n, d, requires_grad=True) for _ in range(3)))
        )
        for b, h, n, d in shapes
    }
    groups["training step, 4 layers x 128, context 256, batch 16"] = lambda: step_contenders(
        ["softmax", "laser", "softmax+selective", "self_adjust"]
    )
    for title, make in groups.items():
        results = measure(make(), arguments.rounds)
        record["results"][title] = results  # type: ignore[index]
        base = next(iter(results.values()))["min_ms"]
        print(f"\n{title}   (baseline {base:.1f} ms CPU, load {os.getloadavg()[0]:.1f})")
        for name, row in results.items():
            print(f"  {name:<26} median {row['median_ratio']:6.2f}x   minimum {row['min_ratio']:6.2f}x")
    if arguments.save:
        path = Path(__file__).parent / "results" / f"cpu-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten: {path}")


def cpu_model() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
