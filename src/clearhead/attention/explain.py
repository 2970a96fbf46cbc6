"""`explain`: which backend would serve a call, and why the others would not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clearhead.attention.attend import make_call
from clearhead.attention.backends import BACKENDS
from clearhead.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Verdict:
    """One backend: "chosen", "could" (it would serve if named) or "refused", with the reason."""

    backend: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The verdicts in the order in which backends are tried; prints as a table."""

    spec: str
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str:
        """Name of the backend that serves."""
        return next(v.backend for v in self.verdicts if v.verdict == "chosen")

    def __str__(self) -> str:
        width = max(len(v.backend) for v in self.verdicts)
        return "\n".join(
            [f"attention {self.spec}"] + [f"  {v.backend:<{width}}  {v.verdict:<7}  {v.reason}" for v in self.verdicts]
        )


def explain(spec: AttentionSpec | str, like: tuple[Tensor, Tensor, Tensor], **arguments: Any) -> Explanation:
    """Tell what `attend(*like, spec, **arguments)` would run on (mask, bias, scale, dropout_p, state as there).

    Temperatures need not be given: they do not change the choice. Raises what `attend` would raise.
    """
    spec = AttentionSpec.parse(spec)
    asked = spec if "temperatures" in arguments else replace(spec, temperature=None)
    state = arguments.get("state")
    before = None if state is None else state.mark()
    try:
        call = make_call(*like, asked, **arguments)
    finally:
        if state is not None:
            state.rollback(before)  # explain only looks
    verdicts, served = [], False
    for backend in BACKENDS.values():
        reason = backend.refuse(call)
        if reason is not None:
            verdicts.append(Verdict(backend.name, "refused", reason))
        else:
            verdicts.append(Verdict(backend.name, "could" if served else "chosen", backend.note(call)))
            served = True
    return Explanation(spec.text, tuple(verdicts))
