"""The value-scale control: reads that multiply the values by a constant first. A plugin of the attention grammar.

    scaled_mean:4     O = A (4 V)
    scaled_laser:4    O = log(A exp(4 V))

`CLEARHEAD_PLUGINS` names this file, so that the workers of a comparison know the two terms (`text.use_plugin`). Load it
that way only: importing it beside would register the terms twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from clearhead.attention.backends import BACKENDS, Backend, choose
from clearhead.attention.call import Call
from clearhead.attention.spec import Laser, Mean, Read, register


@register("scaled_mean")
@dataclass(frozen=True)
class ScaledMean(Read):
    """O = A (by V)."""

    by: float = 1.0


@register("scaled_laser")
@dataclass(frozen=True)
class ScaledLaser(Laser):
    """O = log(A exp(by V)). A `Laser`, so what LASER refuses is refused here too."""

    by: float = 1.0


def _plain(call: Call) -> Call:
    """The same call without the factor: it sits in the values."""
    read = call.spec.read
    assert isinstance(read, ScaledMean | ScaledLaser)
    inner = Laser() if isinstance(read, ScaledLaser) else Mean()
    return replace(call, v=read.by * call.v, spec=replace(call.spec, read=inner))


def _refuse(call: Call) -> str | None:
    return None if isinstance(call.spec.read, ScaledMean | ScaledLaser) else "the values are read as they are"


def _run(call: Call) -> Tensor:
    plain = _plain(call)
    return choose(plain).run(plain)


# First in the list: the others would take a ScaledLaser for a Laser, and the reference anything else for a mean.
_others = dict(BACKENDS)
BACKENDS.clear()
BACKENDS["scaled"] = Backend("scaled", _refuse, lambda call: "values times a constant, then as without it", _run)
BACKENDS.update(_others)
