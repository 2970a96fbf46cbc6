"""What experiments share: runs that are appended to a file as they end, intervals, and the table in a README.

Each run is one line of JSON, so a command that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from scipy import stats

import clearhead

Job = TypeVar("Job")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that a file holds; none when there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(
    path: Path,
    jobs: Sequence[Job],
    run: Callable[[Job], dict[str, Any]],
    *,
    key_of_job: Callable[[Job], Hashable],
    key_of_run: Callable[[dict[str, Any]], Hashable],
    workers: int,
) -> None:
    """Run the jobs that the file does not hold yet, in processes of their own, and append each as it ends."""
    done = {key_of_run(one) for one in read_runs(path)}
    missing = [job for job in jobs if key_of_job(job) not in done]
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        for result in track(pool.imap_unordered(run, missing), total=len(missing), description="training"):
            file.write(json.dumps(result) + "\n")
            file.flush()


def results_folder(here: Path, named: Path | None, *, quick: bool) -> Path:
    """Where a command writes: the folder that was named, a passing one with --quick, or the experiment's own."""
    out = named or (Path(tempfile.mkdtemp()) if quick else here / "results")
    out.mkdir(parents=True, exist_ok=True)
    return out


def run_parts(
    out: Path, parts: Sequence[str], run: Mapping[str, Callable[..., Any]], *, indent: int | None = None, **options: Any
) -> dict[str, Any]:
    """Run parts in turn, each with the folder and `options`, beside what results.json holds of the others.

    It is written after each, so that a long command that is stopped keeps whole parts.
    """
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["about"] = about()
    for part in parts:
        results[part] = run[part](out, **options)
        path.write_text(json.dumps(results, indent=indent) + "\n")
    return results


def mean_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of Student's 95 % interval; None below two values, or without any spread."""
    mean = sum(values) / len(values)
    if len(values) < 2 or max(values) - min(values) < 1e-9 * abs(mean):
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.tstd(values) / math.sqrt(len(values)))


def about() -> dict[str, str]:
    """When and on what results were made."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "clearhead": clearhead.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.python_version()}",
    }


def publish(here: Path, out: Path, lines: Sequence[str], figures: Callable[[], Mapping[str, str]]) -> None:
    """Print a page; where `out` is the experiment's own results, put it into the README and write the figures too."""
    print("\n".join(lines))
    if out == here / "results":
        put_results(here / "README.md", lines)
        for name, svg in figures().items():
            (out / name).write_text(svg)


def put_results(readme: Path, lines: Sequence[str]) -> None:
    """Put lines between the README's marks."""
    before, _, rest = readme.read_text().partition("<!-- results -->")
    _, _, after = rest.partition("<!-- end -->")
    readme.write_text("\n".join([f"{before}<!-- results -->", *lines, f"<!-- end -->{after}"]))
