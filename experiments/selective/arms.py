"""What is compared: softmax, one learned scalar a head (the control), and Selective Self-Attention whole and in parts.

An arm is a set of model options and nothing else; every part of the experiment takes its arms from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SELECTIVE = "softmax+selective"

ARMS: Mapping[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax"},
    "learned scalar": {"attention": "softmax+learned"},
    "selective": {"attention": SELECTIVE},
    "selective, no token part": {"attention": SELECTIVE, "temperature_parts": "position"},
    "selective, no position part": {"attention": SELECTIVE, "temperature_parts": "token"},
    "selective, query only": {"attention": SELECTIVE, "temperature_on": "query"},
    "selective, value only": {"attention": SELECTIVE, "temperature_on": "value"},
    "selective, shared vector": {"attention": SELECTIVE, "temperature_granularity": "shared"},
}
"""By name, fields of `ModelConfig`."""

BASELINE, CONTROL, WHOLE = "softmax", "learned scalar", "selective"
NO_TOKEN, NO_POSITION = "selective, no token part", "selective, no position part"
QUERY_ONLY, VALUE_ONLY, SHARED = "selective, query only", "selective, value only", "selective, shared vector"
FIVE = (BASELINE, CONTROL, WHOLE, NO_TOKEN, NO_POSITION)
