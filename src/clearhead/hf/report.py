"""`PatchReport`: what a patch reached, layer by layer. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer of attention, as the probe saw it."""

    name: str
    """Path of the module in the model."""
    role: str
    """causal | bidirectional | cross."""
    calls: int
    """How often it called the attention in one forward."""
    keywords: tuple[str, ...] = ()
    """Keywords with a value that the model passes beside mask, scale and dropout."""


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did. `print(report)` is a short table."""

    spec: str
    implementation: str
    """The name under which transformers knows the attention."""
    layers: tuple[LayerReport, ...]
    library: str
    """The version of transformers; of torch, with its name."""
    added_parameters: int
    parameters: int
    """All parameters of the model, the added ones among them."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        library = f"transformers {self.library}" if self.library[:1].isdigit() else self.library
        lines = [
            f"{self.spec}: {len(self.layers)} layers of attention patched, as {self.implementation!r} of {library}"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            calls = f"{layer.calls} call{'s' if layer.calls != 1 else ''}"
            extra = f"  {', '.join(layer.keywords)}" if layer.keywords else ""
            lines.append(f"  {layer.name:<{width}}  {layer.role:<13}  {calls}{extra}")
        share = 100.0 * self.added_parameters / max(self.parameters, 1)
        lines.append(f"  parameters: {self.parameters:,}, of which added {self.added_parameters:,} ({share:.2f} %)")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
