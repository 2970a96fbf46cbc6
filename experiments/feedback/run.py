"""Feedback memory: who tracks a state, and what it does for text. `python -m experiments.feedback.run`.

Runs are appended as they end; stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.feedback import figure, text, tracking
from experiments.running import about, put_results, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
PARTS = ("tracking", "text")


def main() -> None:
    """Run what is missing, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only write the report anew")
    parser.add_argument("--seeds", type=int, default=tracking.SEEDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results, or a passing one with --quick")
    parser.add_argument("--compared", type=Path, default=Path("runs/feedback-text"), help="folder of the comparison")
    parser.add_argument("--quick", action="store_true", help="the smallest of each part: shows that it runs")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    if "tracking" in asked.parts:
        run_missing(
            out / "runs.jsonl",
            tracking.jobs(asked.seeds, quick=asked.quick),
            tracking.train_one,
            key_of_job=tracking.key_of_job,
            key_of_run=tracking.key_of_run,
            workers=asked.workers,
        )
    if "text" in asked.parts:
        plan = text.plan(quick=asked.quick, seeds=asked.seeds, workers=asked.workers)
        text.run(plan, out / "compare" if asked.quick else asked.compared, out)
    rows = tracking.summary(read_runs(out / "runs.jsonl"))
    compared = text.read(out)
    verdicts = tracking.judge(rows)
    found = {"about": about(), "tracking": rows, "verdicts": verdicts, "text": compared}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [*tracking.table(rows), "", *(f"- {line}" for line in verdicts), "", *text.page(compared)]
    print("\n".join(lines))
    if out == HERE / "results":
        (out / "feedback.svg").write_text(figure.draw_all(rows, compared))
        put_results(HERE / "README.md", ["![accuracy by steps since the set](results/feedback.svg)", "", *lines])


if __name__ == "__main__":
    main()
