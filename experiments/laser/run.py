"""LASER's claims, put to the test: `python -m experiments.laser.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.laser import figure, prefix_max, saturation, text, text_page, two_tokens
from experiments.running import about, publish, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
PARTS = ("two_tokens", "saturation", "prefix_max", "text")


def main() -> None:
    """Run what is missing, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only write the report anew")
    parser.add_argument(
        "--seeds", type=int, default=None, help=f"default {prefix_max.SEEDS} for prefix_max, 5 for text"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results, or a passing one with --quick")
    parser.add_argument("--compared", type=Path, default=Path("runs/laser-text"), help="folder of the comparison")
    parser.add_argument("--quick", action="store_true", help="the smallest of each part: shows that it runs")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    if "two_tokens" in asked.parts:
        run_missing(
            out / "two_tokens.jsonl",
            two_tokens.jobs(quick=asked.quick),
            two_tokens.measure,
            key_of_job=lambda job: job.key,
            key_of_run=lambda run: (run["kind"], run["value"]),
            workers=asked.workers,
        )
    if "saturation" in asked.parts:
        run_missing(
            out / "saturation.jsonl",
            saturation.jobs(quick=asked.quick),
            saturation.rescue,
            key_of_job=lambda job: job.key,
            key_of_run=lambda run: (run["method"], run["optimizer"]),
            workers=asked.workers,
        )
    if "prefix_max" in asked.parts:
        _prefix_max(out, asked.seeds or prefix_max.SEEDS, quick=asked.quick, workers=asked.workers)
    if "text" in asked.parts:
        plan = text.plan(quick=asked.quick, seeds=asked.seeds or 5, workers=asked.workers)
        text.run(plan, out / "compare" if asked.quick else asked.compared, out)
    report(out)


def _prefix_max(out: Path, seeds: int, *, quick: bool, workers: int) -> None:
    """First the runs that choose the rates, then those that count, then those that verdicts wait for at one rate."""
    path = out / "prefix_max.jsonl"
    for make in (
        lambda: prefix_max.tuning_jobs(quick=quick),
        lambda: prefix_max.final_jobs(read_runs(path), seeds, quick=quick),
        lambda: prefix_max.equal_rate_jobs(read_runs(path), quick=quick),
    ):
        run_missing(
            path,
            make(),
            prefix_max.train_one,
            key_of_job=lambda job: job.key,
            key_of_run=lambda run: (run["arm"], run["rate"], run["seed"]),
            workers=workers,
        )


def report(out: Path) -> None:
    """Write results.json from what the folder holds and print the page; publish the experiment's own results."""
    law, rescued = read_runs(out / "two_tokens.jsonl"), read_runs(out / "saturation.jsonl")
    rows, compared = prefix_max.summary(read_runs(out / "prefix_max.jsonl")), text.read(out)
    found = {"about": about(), "two_tokens": law, "saturation": rescued, "prefix_max": rows, "text": compared}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    figures = figure.figures(law, rescued, rows, compared)
    shown = {
        "### (a) Prefix maximum": ("prefix_max.svg", "error by length", prefix_max.page(rows)),
        "### (b) Two tokens, and many": ("two_tokens.svg", "ratio of the gradients", two_tokens.page(law)),
        "### (c) Saturation": ("saturation.svg", "steps until the output is there", saturation.page(rescued)),
        "### (d) Real text": ("text.svg", "validation by tokens", text_page.page(compared)),
    }
    lines = []
    for title, (name, words, page) in shown.items():
        lines += [title, "", *([f"![{words}](results/{name})", ""] if name in figures else []), *page, ""]
    publish(HERE, out, lines[:-1], lambda: figures)


if __name__ == "__main__":
    main()
