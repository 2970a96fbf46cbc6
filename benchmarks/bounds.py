"""What bounds Self-Adjust and selective temperatures on a CPU: passes over a tile, priced one by one, beside the whole.

    python -m benchmarks.bounds              # prices, calls, training steps; about a minute of one core
    python -m benchmarks.bounds --save       # and write benchmarks/results/bounds-cpu-DATE.json and the page's tables

A price is the least time of a pass over a tile whose buffers are at hand, in nanoseconds a score. The sum over the
passes of a call, times its scores, is what the call would take if nothing else cost anything: no fresh memory, no cold
cache, no Python. The page is docs/self-adjust-speed.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as torch_functional

from clearhead import functional as F
from clearhead.attention.mask import Mask
from clearhead.kernels import chunked
from clearhead.kernels.tiles import tiles

Run = Callable[[], object]
SHAPES = [(4, 3, 128, 32), (1, 8, 512, 64), (1, 8, 1024, 64), (1, 4, 2048, 64), (16, 4, 256, 32)]
PAGE = Path(__file__).parents[1] / "docs" / "self-adjust-speed.md"

# What the kernel and the rule do to every score of a tile; the hidden triangle on the diagonal is left out.
ROW_STATISTICS = ["softmax", "amin", "amax", "sub row"]
FORWARD = ["product", *ROW_STATISTICS, "mul", "product"]
BACKWARD = ["product", "product", *ROW_STATISTICS, "addcmul", "mul row", "sub row", "mul", "mul", "product"]
BACKWARD += ["product onto keys", "product onto keys"]
EXTREMA = ["sum", *2 * ["eq row", "sum", "addcmul row"]]


def prices(lanes: int, rows: int, columns: int, dim: int) -> dict[str, float]:
    """Nanoseconds a score of each pass over a tile."""
    x, y, z, out = (torch.randn(lanes, rows, columns) for _ in range(4))
    row, q = torch.rand(lanes, rows, 1), torch.randn(lanes, rows, dim)
    k, key_gradient = torch.randn(lanes, columns, dim), torch.zeros(lanes, columns, dim)
    across = torch.zeros(lanes, dim, columns)
    below = -x.abs()
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)[None]
    keep = hidden.to(torch.int32) - 1
    passes: dict[str, Run] = {
        "product": lambda: torch.bmm(q, k.mT, out=out),
        "product onto keys": lambda: key_gradient.baddbmm_(x.mT, q),
        "softmax": lambda: torch.softmax(x, dim=-1, out=out),
        "amin": lambda: x.amin(-1),
        "amax": lambda: x.amax(-1),
        "sum": lambda: x.sum(-1),
        "sub row": lambda: torch.sub(x, row, out=out),
        "mul row": lambda: torch.mul(x, row, out=out),
        "mul": lambda: torch.mul(x, y, out=out),
        "addcmul": lambda: torch.addcmul(x, y, z, out=out),
        "addcmul row": lambda: torch.addcmul(x, y, row, out=out),
        "eq row": lambda: torch.eq(x, row, out=out),
        # What is not used, and why.
        "product onto keys, columns inner": lambda: across.baddbmm_(q.mT, x),
        "exp alone": lambda: torch.exp(below, out=out),
        "aminmax": lambda: torch.aminmax(x, dim=-1),
        "argmax": lambda: x.argmax(-1),
        "masked_fill_": lambda: z.masked_fill_(hidden, 0.0),
        "bitwise and": lambda: z.view(torch.int32).bitwise_and_(keep),
        "mul into fresh memory": lambda: x * y,
    }
    return {name: 1e9 * least(run) / x.numel() for name, run in passes.items()}


def least(run: Run, repeats: int = 40) -> float:
    """Least CPU seconds of one run."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time_ns()
        run()
        times.append(time.process_time_ns() - began)
    return min(times) * 1e-9


def interleaved(contenders: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender, once a round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in contenders.items():
            began = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def against_first(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Least milliseconds; ratio to the first contender: of the least times, and the median of the rounds' ratios."""
    base = next(iter(times.values()))
    return {
        name: {
            "ms": min(own) * 1e3,
            "least": min(own) / min(base),
            "median": statistics.median(a / b for a, b in zip(own, base, strict=True)),
        }
        for name, own in times.items()
    }


def call(shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """A causal call, forward and backward: its tiles, the sum of its passes, and what it takes."""
    b, h, n, d = shape
    cut = tiles(
        (b, h, h, n, n), Mask.causal(0), None, [], torch.device("cpu"), rows=chunked.ROWS, elements=chunked.ELEMENTS
    )
    sizes = [
        (
            (t.batch.stop - t.batch.start) * (t.heads.stop - t.heads.start),
            t.rows.stop - t.rows.start,
            t.keys.stop - t.keys.start if isinstance(t.keys, slice) else len(t.keys),
        )
        for t in cut
    ]
    scores = sum(lanes * rows * columns for lanes, rows, columns in sizes)
    price = prices(*max(sizes, key=lambda s: s[0] * s[1] * s[2]), d)
    products = sum(price[name] for name in FORWARD + BACKWARD if name.startswith("product"))
    rest = sum(price[name] for name in FORWARD + BACKWARD if not name.startswith("product"))
    extrema = sum(price[name] for name in EXTREMA)

    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)

    def both(forward: Callable[..., torch.Tensor], **options: bool) -> Run:
        def run() -> None:
            q.grad = k.grad = v.grad = None
            forward(q, k, v, is_causal=True, **options).backward(gradient)

        return run

    measured = interleaved(
        {
            "torch sdpa": both(torch_functional.scaled_dot_product_attention),
            "self_adjust": both(F.self_adjust_attention),
            "self_adjust detached": both(F.self_adjust_attention, detach_extrema=True),
        },
        rounds,
    )
    return {
        "tiles": len(sizes),
        "million scores": scores / 1e6,
        "prices": price,
        "products ms": products * scores * 1e-6,
        "passes ms": rest * scores * 1e-6,
        "extrema ms": extrema * scores * 1e-6,
        "measured": against_first(measured),
    }


# Layers, width, context and batch; heads of 32. The first is what `clearhead compare` trains.
MODELS = {
    "2 x 96, 4 x 128": (2, 96, 128, 4),
    "2 x 128, 8 x 256": (2, 128, 256, 8),
    "2 x 256, 8 x 256": (2, 256, 256, 8),
}


def steps(layers: int, width: int, context: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Whole training steps of a small decoder: forward, loss, backward, AdamW."""
    from clearhead.models.config import ModelConfig
    from clearhead.models.decoder import Decoder
    from clearhead.objectives.causal_lm import causal_lm_loss

    tokens = torch.randint(0, 256, (batch, context + 1), generator=torch.Generator().manual_seed(0))

    def step(attention: str) -> Run:
        config = ModelConfig(context=context, layers=layers, width=width, heads=width // 32, attention=attention)
        model = Decoder(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def run() -> None:
            total, count = causal_lm_loss(model(tokens[:, :-1]), tokens[:, 1:])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    names = ["softmax", "laser", "softmax+selective", "self_adjust"]
    return against_first(interleaved({name: step(name) for name in names}, rounds))


def temperatures(layers: int, width: int, context: int, batch: int, rounds: int) -> dict[str, float]:
    """Least milliseconds, forward and backward, of what selective temperatures must do in all layers of a model."""
    from clearhead.layers.temperature import TokenPart

    part = TokenPart(width // 32, 32, "head_slice")
    rows = torch.randn(batch, context, width, requires_grad=True)
    tau = torch.rand(batch, context, width // 32, 1, requires_grad=True)
    on_rows, on_heads = torch.randn(batch, context, width), torch.randn(batch, width // 32, context)
    learned = list(part.parameters())

    def scaled() -> torch.Tensor:
        return (rows.unflatten(-1, (-1, 32)) * tau).flatten(2)

    runs: dict[str, Run] = {
        "GELU": lambda: torch.autograd.grad(torch_functional.gelu(rows), rows, on_rows),
        "GELU, vector, tanh": lambda: torch.autograd.grad(part(rows), [rows, *learned], on_heads),
        "scaling": lambda: torch.autograd.grad(scaled(), [rows, tau], on_rows),
    }
    # One for queries and one for values in each layer.
    return {name: least(run, 20 * rounds) * 1e3 * 2 * layers for name, run in runs.items()}


def tables(record: dict[str, Any]) -> str:
    """The page's figures, as Markdown."""
    calls = record["calls"]
    lines = [
        f"{record['date']}, PyTorch {record['torch']}, one thread, {record['rounds']} rounds, "
        f"load {record['load'][0]:.1f} to {record['load'][1]:.1f}.",
        "",
        "| pass, ns a score | " + " | ".join(calls) + " |",
        "|---|" + "---|" * len(calls),
    ]
    names = list(next(iter(calls.values()))["prices"])
    lines += [f"| {name} | " + " | ".join(f"{c['prices'][name]:.2f}" for c in calls.values()) + " |" for name in names]
    lines += ["", "| forward and backward, ms | " + " | ".join(calls) + " |", "|---|" + "---|" * len(calls)]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("tiles; million scores", lambda c: f"{c['tiles']}; {c['million scores']:.2f}"),
        ("matrix products", lambda c: f"{c['products ms']:.1f}"),
        ("other passes", lambda c: f"{c['passes ms']:.1f}"),
        ("gradient at the extrema", lambda c: f"{c['extrema ms']:.1f}"),
        ("sum", lambda c: f"{c['products ms'] + c['passes ms'] + c['extrema ms']:.1f}"),
        ("measured", lambda c: f"{c['measured']['self_adjust']['ms']:.1f}"),
        ("PyTorch's SDPA", lambda c: f"{c['measured']['torch sdpa']['ms']:.1f}"),
        ("ratio, least (median)", lambda c: _ratio(c["measured"]["self_adjust"])),
        ("detached, least (median)", lambda c: _ratio(c["measured"]["self_adjust detached"])),
    ]
    lines += [f"| {title} | " + " | ".join(cell(c) for c in calls.values()) + " |" for title, cell in rows]
    models = record["steps"]
    lines += ["", "| training step, least (median) | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for name in next(iter(models.values())):
        lines.append(f"| {name} | " + " | ".join(_ratio(w[name]) for w in models.values()) + " |")
    parts = record["temperatures"]
    lines += ["", "| of softmax's step | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
    for name in next(iter(parts.values())):
        shares = [part[name] / models[model]["softmax"]["ms"] for model, part in parts.items()]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def _ratio(row: dict[str, float]) -> str:
    return f"{row['least']:.2f} ({row['median']:.2f})"


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, at least 9 for a figure to quote")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/bounds-cpu-DATE.json and the page"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = os.getloadavg()[0]
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "calls": {"b{} h{} n{} d{}".format(*shape): call(shape, arguments.rounds) for shape in SHAPES},
        "steps": {name: steps(*sizes, arguments.rounds) for name, sizes in MODELS.items()},
        "temperatures": {name: temperatures(*sizes, arguments.rounds) for name, sizes in MODELS.items()},
    }
    record["load"] = [before, os.getloadavg()[0]]
    text = tables(record)
    print(text)
    if arguments.save:
        path = Path(__file__).parent / "results" / f"bounds-cpu-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        head, _, rest = PAGE.read_text().partition("<!-- results -->")
        PAGE.write_text(f"{head}<!-- results -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
