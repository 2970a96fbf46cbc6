"""Self-Adjust Softmax put to the test: `python -m experiments.self_adjust.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.running import about, publish, results_folder
from experiments.self_adjust import jacobian, judge, report, saturation, text

HERE = Path(__file__).parent
PARTS = ("jacobian", "text", "saturation")
SEEDS = 6


def main() -> None:
    """Run the parts, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only write the report anew")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the verdict; a comparison's are fixed once begun")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results, or a passing one with --quick")
    parser.add_argument("--compared", type=Path, default=Path("runs/self-adjust"), help="folder of the comparisons")
    parser.add_argument("--quick", action="store_true", help="the smallest of each part: shows that it runs")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    folder = out / "compare" if asked.quick else asked.compared
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "jacobian" in asked.parts:
        results["jacobian"] = jacobian.run(quick=asked.quick)
    if "text" in asked.parts:
        text.run(folder, out, judge.wanted, seeds=asked.seeds, workers=asked.workers, quick=asked.quick)
    if "saturation" in asked.parts:
        saturation.run(folder, out, seeds=asked.seeds, workers=asked.workers, quick=asked.quick)
    if asked.parts:
        results["about"] = about()
    path.write_text(json.dumps(results, indent=1) + "\n")
    whole = results | {"text": text.read(out), "saturation": saturation.read(out)}
    publish(HERE, out, report.page(whole), lambda: report.figures(whole))


if __name__ == "__main__":
    main()
