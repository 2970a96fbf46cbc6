"""What is compared: the forms of Self-Adjust, the controls, and which comparisons were declared before any run."""

from __future__ import annotations

import os
from pathlib import Path

from clearhead.attention.plugins import VARIABLE, load_plugins

CONTROLS = Path(__file__).with_name("controls.py")

BASELINE, DEFAULT, DETACHED = "softmax", "range", "range, detached"
FORMS = {
    "product": "self_adjust:form=product",
    "min_shift": "self_adjust:form=min_shift",
    "min_shift, detached": "self_adjust:form=min_shift,detach_extrema=true",
    "minmax": "self_adjust:form=minmax",
    "minmax, detached": "self_adjust:form=minmax,detach_extrema=true",
    DEFAULT: "self_adjust",
    DETACHED: "self_adjust:detach_extrema=true",
}
"""Every form, with gradient through the row's extrema and with them detached; product has no extrema."""
SPECS = {BASELINE: "softmax", **FORMS}

ROW_SUM, SHAPE, GRADIENT, VALUES = "row sum alone", "shape alone", "gradient alone", "function alone"
GATE, TEMPERATURE = "output gate", "learned temperature"
EXPLAINING = {
    ROW_SUM: "model.attention=self_adjust_part:row_sum",
    SHAPE: "model.attention=self_adjust_part:shape",
    GRADIENT: "model.attention=self_adjust_part:gradient",
    VALUES: "model.attention=self_adjust_part:values",
    GATE: "model.output_gate=head",
    TEMPERATURE: "model.attention=softmax+learned",
}
"""Controls, all of the default form `range`: parts of it (controls.py), and what reviewers would try instead."""

POSITIONS = ("learned", "alibi", "t5")
"""Beside `MAIN`, which all other arms use. A position that the package learns joins by its name."""
MAIN = "rope"


def overrides(name: str) -> str:
    """What an arm changes, as `clearhead compare` reads it."""
    return f"model.attention={FORMS[name]}" if name in FORMS else EXPLAINING.get(name, "")


def arm(name: str) -> str:
    """An arm as `clearhead compare` reads it."""
    return f"{name}: {overrides(name)}"


def use_controls() -> None:
    """Make `self_adjust_part` known here and, through the environment, in the workers of a comparison."""
    named = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    if str(CONTROLS) not in named:
        os.environ[VARIABLE] = os.pathsep.join([*named, str(CONTROLS)])
    load_plugins()
