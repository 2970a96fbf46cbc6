"""Records as `clearhead bench` writes them, made up."""

from __future__ import annotations

from typing import Any

from clearhead.bench.timing import summarise

ROUNDS = 9


def result(seconds: float, base: float, **changes: Any) -> dict[str, Any]:
    own = [seconds * (1 + 0.001 * i) for i in range(ROUNDS)]
    return {
        "source": "clearhead", "family": "softmax", "equals": "softmax", "beside": "", "note": "",
        **summarise(own, [base] * ROUNDS),
        "parameters": None, "difference": None, "peak_bytes": None, "seconds": own, **changes,
    }  # fmt: skip


def group(operation: str, length: int, results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    step = operation == "step"
    return {
        "operation": operation, "on": "compare" if step else "", "length": length, "shape": f"a shape of {length}",
        "title": f"{operation} of {length}", "baseline": "softmax" if step else "torch sdpa", "rounds": ROUNDS,
        "load": [0.1, 0.1, 0.1], "cpu_share": 0.99, "results": results, "absent": [], **changes,
    }  # fmt: skip


def attention_group(length: int, laser: float, self_adjust: float, written_out: float) -> dict[str, Any]:
    """SDPA takes a second, the others the seconds given."""
    return group(
        "forward+backward",
        length,
        {
            "torch sdpa": result(1.0, 1.0, source="torch", difference=0.0, peak_bytes=3 << 20),
            "laser": result(laser, 1.0, family="laser", equals="laser", peak_bytes=5 << 20),
            "laser written out": result(
                1.2, 1.0, source="written-out", family="laser", equals="laser", difference=3e-7, note="slow"
            ),
            "self_adjust": result(self_adjust, 1.0, family="self_adjust", equals="self_adjust"),
            "self_adjust written out": result(
                written_out, 1.0, source="written-out", family="self_adjust", equals="self_adjust", difference=1e-6
            ),
        },
    )


def step_group(**ratios: float) -> dict[str, Any]:
    results = {"softmax": result(1.0, 1.0, parameters=1000)}
    results |= {
        name.replace("_plus_", "+"): result(ratio, 1.0, parameters=1000, equals=name) for name, ratio in ratios.items()
    }
    return group("step", 128, results)


def record(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "what": "clearhead bench", "format": 1,
        "machine": {
            "date": "2026-01-02T03:04:05+00:00", "processor": "a processor", "cores": 1, "memory_bytes": 1 << 30,
            "device": "cpu", "system": "Linux 1", "threads": 1, "versions": {"torch": "2.13.0"}, "commit": None,
        },
        "load_before": [0.1, 0.1, 0.1], "load_after": [1.0, 0.5, 0.2],
        "plan": {"device": "cpu", "dtype": "float32", "rounds": ROUNDS},
        "clock": "a clock", "groups": list(groups), **changes,
    }  # fmt: skip
