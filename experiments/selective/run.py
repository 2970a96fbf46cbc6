"""Selective Self-Attention's claims: `python -m experiments.selective.run`. Stopped, the same command goes on.

Runs are appended as they end. `--parts` with no name only writes the report anew, from the runs that there are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.running import about, publish, results_folder
from experiments.selective import (
    claims,
    denoising,
    dilution,
    figure,
    parameters,
    passkey,
    report,
    text,
    theory,
    token_generation,
)
from experiments.selective.judge import judge
from experiments.selective.tuned import run_plan

HERE = Path(__file__).parent
Results = dict[str, Any]


def dilution_part(out: Path, asked: argparse.Namespace) -> Results:
    """(a) By arithmetic, and trained."""
    rows = theory.table()
    plan = dilution.plan(asked.seeds, quick=asked.quick)
    own = claims.of_dilution()
    found = run_plan(plan, out / "dilution.jsonl", dilution.train, workers=asked.workers, families=[own])
    return {
        "theory": {"found": rows, "claims": claims.of_theory(rows)},
        "dilution": {"found": found, "claims": judge(own, found["runs"], found["again"])},
    }


def token_generation_part(out: Path, asked: argparse.Namespace) -> Results:
    """(b) Neighbours in a graph."""
    plan = token_generation.plan(asked.seeds, quick=asked.quick)
    own = claims.of_token_generation(plan.settings)
    path = out / "token_generation.jsonl"
    found = run_plan(plan, path, token_generation.train, workers=asked.workers, families=[own])
    return {"token_generation": {"found": found, "claims": judge(own, found["runs"], found["again"])}}


def denoising_part(out: Path, asked: argparse.Namespace) -> Results:
    """(c) Signals among noise."""
    plan = denoising.plan(asked.seeds, quick=asked.quick)
    own = claims.of_denoising(plan.settings)
    found = run_plan(plan, out / "denoising.jsonl", denoising.train, workers=asked.workers, families=[own])
    found["untrained"] = {sigma: denoising.untrained(float(sigma)) for sigma in plan.settings}
    return {"denoising": {"found": found, "claims": judge(own, found["runs"], found["again"])}}


def passkey_part(out: Path, asked: argparse.Namespace) -> Results:
    """(d) and, of the same models, (e)."""
    plans = passkey.plans(asked.seeds, quick=asked.quick)
    settings = [setting for plan in plans for setting in plan.settings]
    own = claims.of_passkey(settings, str(passkey.LENGTHS[-1]))
    families = [own, claims.of_maps(settings)]
    parts = [
        run_plan(plan, out / "passkey.jsonl", passkey.train, workers=asked.workers, families=families) for plan in plans
    ]
    found = {**parts[0]} | {key: [one for part in parts for one in part[key]] for key in ("runs", "again", "rates")}
    return {"passkey": {"found": found, "claims": judge(own, found["runs"], found["again"])}}


def text_part(out: Path, asked: argparse.Namespace) -> Results:
    """(f) and, of the same models, (e)."""
    plan = text.plan(seeds=asked.seeds, workers=asked.workers, quick=asked.quick)
    text.run(plan, out / "compare" if asked.quick else asked.compared, out)
    found = text.read(out)
    assert found is not None
    return {"text": {"found": found, "claims": judge(claims.of_text(), text.as_runs(found), found.get("again", ()))}}


def maps_part(results: Mapping[str, Any]) -> Results:
    """(e) What the runs of (d) and (f) say of their maps."""
    passkeys = results["passkey"]["found"] if "passkey" in results else {"runs": [], "rates": [], "grid": []}
    again = list(passkeys.get("again", ()))
    found = {"runs": list(passkeys["runs"]), "rates": list(passkeys["rates"]), "grid": passkeys["grid"]}
    if "text" in results:
        compared = results["text"]["found"]
        found["runs"] += text.as_runs(compared)
        again += compared.get("again", [])
        found["rates"] += [
            {"arm": arm["name"], "setting": "text", "rate": arm["rate"], "at_edge": arm["at_edge"]}
            for arm in compared["arms"]
        ]
    settings = list(dict.fromkeys(run["setting"] for run in found["runs"]))
    judged = judge(claims.of_maps(settings), found["runs"], again)
    # The runs themselves stand under their own parts already.
    slim = [
        {key: run[key] for key in ("arm", "setting", "seed", "status", "maps") if key in run} for run in found["runs"]
    ]
    return {"maps": {"found": found | {"runs": slim}, "claims": judged}}


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Results]] = {
    "dilution": dilution_part,
    "token_generation": token_generation_part,
    "denoising": denoising_part,
    "passkey": passkey_part,
    "text": text_part,
}


def main() -> None:
    """Run the parts, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=None, help="default all; none: the report")
    parser.add_argument("--seeds", type=int, default=5, help="(b) takes twice as many")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--compared", type=Path, default=Path("runs/selective-text"), help="folder of the comparison")
    parser.add_argument("--quick", action="store_true", help="a few steps of two seeds; README and figures stay")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    path = out / "results.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    results["about"] = about()
    for part in PARTS if asked.parts is None else asked.parts:
        results |= PARTS[part](out, asked)
        path.write_text(json.dumps(results, indent=1) + "\n")  # a long command that is stopped keeps whole parts
    if "passkey" in results or "text" in results:
        results |= maps_part(results)
    rows = parameters.table()
    results["parameters"] = {"found": rows, "claims": claims.of_parameters(rows)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    publish(HERE, out, report.page(results), lambda: figure.draw_all(results))


if __name__ == "__main__":
    main()
