"""A report as a file: strict JSON that reads back to equal traces. Imports no torch.

JSON has no numbers that are not finite. They are written as the strings "NaN", "Infinity" and "-Infinity", which
Python's `float` and JavaScript's `Number` both read. Reading turns exactly these strings back into numbers wherever
they stand alone as a value; a fact whose text happens to be "NaN" therefore comes back as a number. Tuples among the
facts and overrides come back as lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clearhead.errors import UserError
from clearhead.signal.findings import Advice, Finding, Report
from clearhead.signal.trace import Trace

NAME = "inspect.json"
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """Turn values into JSON's own types; numbers that are not finite and whatever JSON does not know become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return [plain(inner) for inner in sorted(value, key=str)]
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        return plain(value.tolist())
    return value.as_posix() if isinstance(value, Path) else str(value)


def to_json(report: Report) -> str:
    """Return the report as strict JSON."""
    # Without an indent: json's fast encoder has none, and a thousand layers hold half a million values.
    return json.dumps(plain(report.to_dict()), allow_nan=False) + "\n"


def read(path: Path | str) -> Report:
    """Read back what `write_report` left: the folder, or its inspect.json. Raises `UserError` for anything else."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); expected a folder of clearhead inspect") from None
    except ValueError:
        raise UserError(f"{file}: not JSON; expected what clearhead inspect wrote") from None
    try:
        return _report(_numbers(values))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not an inspection ({type(error).__name__}: {error})") from None


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _report(values: Mapping[str, Any]) -> Report:
    advice = (
        {
            **one,
            "cures": tuple(one["cures"]),
            "leaves": tuple(one["leaves"]),
            "predicted": Trace.from_dict(one["predicted"]),
        }
        for one in values["advice"]
    )
    return Report(
        title=values["title"],
        predicted=Trace.from_dict(values["predicted"]),
        measured=None if values["measured"] is None else Trace.from_dict(values["measured"]),
        findings=tuple(Finding(**one) for one in values["findings"]),
        advice=tuple(Advice(**one) for one in advice),
        verdict=values["verdict"],
        facts=dict(values["facts"]),
    )
