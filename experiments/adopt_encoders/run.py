"""Adopted encoders: `python -m experiments.adopt_encoders.run`. Stopped, it goes on; `--quick`: a minute.

Needs `clearhead data fetch minilm antiberty whisper-tiny antibodies bible-kjv verses`, and the clips (the error names
the command); `--parts digits` needs scikit-learn alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clearhead.errors import UserError
from experiments.adopt_encoders import antibodies, digits, report, sentences, speech
from experiments.adopt_encoders.under import OWN, UNIFORM
from experiments.running import about, publish, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
SAME = ("softmax", "softmax+selective")
"""What must change nothing."""
OTHERS = ("laser", "self_adjust", "self_adjust:form=product")


def performers(features: int, draws: int = 3) -> list[str]:
    """Performer specs, one a draw of the rows."""
    return [f"performer:features={features}" + f",seed={seed}" * bool(seed) for seed in range(draws)]


def similarity(quick: bool) -> list[Any]:
    """MiniLM."""
    if quick:
        return [sentences.Job("verses", arm, 20) for arm in (OWN, "softmax", "performer:features=64")]
    verses = [OWN, *SAME, *OTHERS, *performers(64), *performers(256), *performers(1024), UNIFORM]
    blocks = ["bigbird:block_size=16", "bigbird:block_size=16,random_blocks=0", "window:65"]
    passages = [OWN, *SAME, *OTHERS, *performers(256, 1), *performers(1024, 1), *blocks, UNIFORM]
    return [
        *(sentences.Job("verses", arm, 150) for arm in verses),
        *(sentences.Job("passages", arm, 30) for arm in passages),
    ]


def residues(quick: bool) -> list[Any]:
    """AntiBERTy."""
    if quick:
        return [antibodies.Job(arm, 1) for arm in (OWN, "softmax", "performer:features=64")]
    blocks = ["bigbird:block_size=8", "bigbird:block_size=8,random_blocks=0", "window:33"]
    arms = [OWN, *SAME, *OTHERS, *performers(64, 1), *performers(256), *performers(1024, 1), *blocks, UNIFORM]
    return [*(antibodies.Job(arm, 8) for arm in arms), antibodies.Job(OWN, 10, "proteins")]


def recoveries(quick: bool) -> list[Any]:
    """Performer trained on, beside softmax trained on the same."""
    if quick:
        return [antibodies.Recovery("performer:features=64", 0, 2, (0, 2), 1)]
    arms = ("performer:features=256", "softmax")
    return [antibodies.Recovery(arm, seed, 40, (0, 20, 40), 4) for seed in range(3) for arm in arms]


def transcripts(quick: bool) -> list[Any]:
    """Whisper."""
    arms = (OWN, "laser") if quick else (OWN, "softmax", "laser", "self_adjust")
    return [speech.Job(arm, 1 if quick else 20) for arm in arms]


def images(quick: bool) -> list[Any]:
    """The vision transformer."""
    arms = (OWN, "laser") if quick else (OWN, "laser", "self_adjust", "softmax+selective")
    return [digits.Job(arm, seed, 1 if quick else 15) for seed in range(1 if quick else 5) for arm in arms]


PARTS: dict[str, tuple[Callable[[bool], list[Any]], Callable[[Any], dict[str, Any]]]] = {
    "sentences": (similarity, sentences.measure),
    "antibodies": (residues, antibodies.measure),
    "recovery": (recoveries, antibodies.recover),
    "speech": (transcripts, speech.measure),
    "digits": (images, digits.train),
}


def one(job: tuple[str, Any]) -> dict[str, Any]:
    """Run a job; an attention that `patch` refuses is an answer too, with its reason."""
    part, what = job
    began = time.process_time()
    try:
        found = PARTS[part][1](what)
    except UserError as error:
        if "clearhead data fetch" in str(error) or "apt-get" in str(error):
            raise
        found = {"refused": str(error)}
    return {"job": key(job), "part": part, "attention": what.attention, **found} | {
        "cpu_seconds": round(time.process_time() - began, 1)
    }


def key(job: tuple[str, Any]) -> str:
    """A job by its text."""
    return f"{job[0]}: {job[1]}"


def run(parts: Sequence[str], out: Path, *, quick: bool, workers: int) -> dict[str, Any]:
    """All jobs that are not done; those that were refused are asked again."""
    answer: dict[str, Any] = {}
    for part in parts:
        jobs = [(part, job) for job in PARTS[part][0](quick)]
        path = out / f"{part}.jsonl"
        if any("refused" in found for found in read_runs(path)):
            kept = [json.dumps(found) for found in read_runs(path) if "refused" not in found]
            path.write_text("".join(f"{line}\n" for line in kept))
        run_missing(path, jobs, one, key_of_job=key, key_of_run=lambda found: found["job"], workers=workers)
        found = {run["job"]: run for run in read_runs(path)}
        answer[part] = [found[key(job)] for job in jobs]
    return answer


def main() -> None:
    """Run the parts, write results.json, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    out = results_folder(HERE, options.out, quick=options.quick)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results |= run(options.parts, out, quick=options.quick, workers=options.workers)
    results["about"] = about() | {"transformers": _transformers()}
    file.write_text(json.dumps(results, indent=1) + "\n")
    publish(HERE, out, report.page(results), dict)


def _transformers() -> str:
    from importlib.metadata import version

    return version("transformers")


if __name__ == "__main__":
    main()
