"""`clearhead explain`. Imports torch only once what was asked is known to make sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clearhead._run_commands import as_user_error
from clearhead.errors import UserError

if TYPE_CHECKING:
    from clearhead._options import Explain
    from clearhead.attention.explain import Explanation
    from clearhead.memory.explain import MemoryExplanation
    from clearhead.models.config import ModelConfig


def explain_command(asked: Explain) -> None:
    """Print which backend would serve, or what a decoder's memory holds. Raises `UserError`."""
    from clearhead.attention.spec import AttentionSpec

    spec = AttentionSpec.parse(asked.spec)  # before torch is loaded: a misspelt name is answered at once
    heads = asked.heads, asked.heads if asked.kv_heads is None else asked.kv_heads
    if min(asked.batch, *heads, asked.length, asked.head_dim, asked.layers) < 1:
        raise UserError("explain: expected sizes of at least 1")
    if asked.memory is not None:
        _explain_memory(asked)
        return
    if asked.segment is not None:
        raise UserError("--segment goes with --memory; --length says how many queries and keys there are")
    import torch

    from clearhead.attention.explain import explain
    from clearhead.attention.mask import Mask
    from clearhead.train.world import choose_device

    device = choose_device(asked.device, 0)
    shapes = [(asked.batch, h, asked.length, asked.head_dim) for h in heads]
    query, key = (torch.empty(shape, dtype=getattr(torch, asked.dtype), device=device) for shape in shapes)
    mask = Mask.causal() if asked.causal else Mask()
    if asked.padding:
        lengths = torch.full((asked.batch,), asked.length, device=device)
        lengths[0] = max(1, asked.length // 2)
        mask = mask & Mask.key_lengths(lengths)
    with as_user_error():
        found = explain(spec, (query, key, key), mask=mask, dropout_p=asked.dropout)
    words = [f"{asked.batch} x {asked.heads} heads x {asked.length} x {asked.head_dim}", asked.dtype, str(device)]
    words += ["causal" if asked.causal else "bidirectional", *(["padded"] if asked.padding else [])]
    _print_verdicts(found, ", ".join(words))


def _explain_memory(asked: Explain) -> None:
    from clearhead.memory.layout import MemoryLayout
    from clearhead.models.config import ModelConfig

    if not asked.causal or asked.padding:
        raise UserError("--memory: a decoder reads its stream causally and without padding; leave the two options out")
    layout = MemoryLayout.parse(asked.memory)
    config = ModelConfig(
        attention=asked.spec,
        memory=str(layout),
        layers=asked.layers,
        width=asked.heads * asked.head_dim,
        heads=asked.heads,
        kv_heads=asked.kv_heads,
        context=asked.length if asked.segment is None else asked.segment,
        position=asked.position,
    )
    import torch

    from clearhead.memory.explain import explain_memory
    from clearhead.train.world import choose_device

    dtype, device = getattr(torch, asked.dtype), choose_device(asked.device, 0)
    with as_user_error():
        found = explain_memory(config, batch=asked.batch, dtype=dtype, device=device, dropout_p=asked.dropout)
    _print_memory(found, config, asked)


def _print_memory(found: MemoryExplanation, config: ModelConfig, asked: Explain) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"memory {found.layout}: {config.attention}, segments of {found.segment}, {asked.batch} x width "
        f"{config.width}, {asked.dtype}",
        title_justify="left",
    )
    table.add_column("layer")
    for name in ("tokens remembered", "bytes", "keys per query"):
        table.add_column(name, justify="right")
    table.add_column("backend")
    for number, layer in enumerate(found.layers):
        table.add_row(str(number), f"{layer.tokens:,}", f"{layer.bytes:,}", f"{layer.keys:,.1f}", layer.backend)
    table.add_section()
    table.add_row("all", f"{found.tokens:,}", f"{found.bytes:,}", f"{found.keys:,.1f}", "")
    console = Console()
    console.print(table)
    longest = max(layer.tokens for layer in found.layers)
    if found.tokens:
        console.print(
            f"full:{longest} would hold {longest * len(found.layers) / found.tokens:.2g} times as much. While decoding, "
            f"at most {found.stream_bytes:,} bytes of keys, values and open segment come on top.",
            highlight=False,
        )


def _print_verdicts(found: Explanation, circumstances: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.spec}: {circumstances}", title_justify="left")
    for name in ("backend", "verdict", "reason"):
        table.add_column(name)
    styles = {"chosen": "green", "refused": "dim"}
    for verdict in found.verdicts:
        table.add_row(verdict.backend, verdict.verdict, verdict.reason, style=styles.get(verdict.verdict, ""))
    Console().print(table)
