"""The tiny jobs that are killed and starved: one training, one preparation of data, one comparison; and their results.

`timeless` is what must be equal between a run that was left alone and one that was not: everything but the clock, the
memory and how often it was started.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clearhead.cli import main
from clearhead.data.cache import file_sha256
from clearhead.data.catalogue import CATALOGUE, Entry
from clearhead.data.config import DataConfig
from clearhead.data.text import prepare
from clearhead.train import checkpoint as store

Command = Callable[[], int]

SMALL = {
    "model.layers": "1", "model.width": "16", "model.heads": "2", "data.val_fraction": "0.2",
    "data.test_fraction": "0.2", "train.eval_tokens": "64", "train.test_tokens": "64", "train.log_every": "1",
    "train.batch_size": "2", "train.checkpoint_every": "2", "train.eval_every": "3",
}  # fmt: skip
CLOCKED = (
    "second",
    "speed",
    "starts",
    "memory",
    "load_average",
    "date",
    "sessions",
    "mixed",
    "probe",
    "folder",
    "commit",
)
"""Parts of names of what hangs on the clock, the machine's load, how often a command was started, or on an edit of the
source between two starts."""


def write_texts(folder: Path, documents: int = 10) -> Path:
    """Ten short documents of made-up words, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(40)]
    for number in range(documents):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=60 + 5 * number)), encoding="utf-8")
    return folder


def use_data(folder: Path) -> None:
    """Keep fetched and prepared data in `folder` from now on, in this process."""
    os.environ["CLEARHEAD_DATA"] = str(folder)


# ---- train ----


def train(text: Path, run: Path, data: Path, *more: str) -> Command:
    def command() -> int:
        use_data(data)
        options = [x for key, value in SMALL.items() for x in (f"--{key.replace('_', '-')}", value)]
        words = ["train", "--out", str(run), "--data", str(text), "--model", "tiny", "--context", "32", "--steps", "6"]
        return main([*words, "--train.threads", "1", *options, *more])

    return command


def trained(run: Path) -> dict[str, Any]:
    """What a finished run leaves: hashes of weights and optimizer, its history, lines and summary."""
    newest = store.read(store.newest_model(run))
    history = {name: column.tolist() for name, column in newest.tensors[store.HISTORY].items() if "seconds" not in name}
    files = (store.MODEL, store.OPTIMIZER, store.MODEL_CONFIG)
    return {
        "files": {name: file_sha256(newest.folder / name) for name in files},
        "tokenizer": file_sha256(run / "tokenizer.json"),
        "history": history,
        "lines": [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "result": timeless(json.loads((run / "result.json").read_text())),
    }


def timeless(value: Any) -> Any:
    """`value` without what hangs on the clock."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(part in k for part in CLOCKED)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


# ---- data ----


def add_set(archive: Path) -> str:
    """A data set of ours in the catalogue of this process, whose archive is `archive` (an npm package, made here)."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        draw = random.Random(3)
        with tarfile.open(archive, "w:gz") as tape:
            for number in range(6):
                data = " ".join("".join(draw.choices("abcdef ", k=6)) for _ in range(150)).encode()
                info = tarfile.TarInfo(f"package/text{number}.txt")
                info.size = len(data)
                tape.addfile(info, io.BytesIO(data))
    name = "faults-words"
    CATALOGUE[name] = Entry(
        name=name, about="words", kind="npm", package="faults-words", version="1.0", archive=archive.name,
        sha256=file_sha256(archive), archive_bytes=archive.stat().st_size, text_bytes=1, documents=6, licence="none",
        take=("package/*.txt",),
    )  # fmt: skip
    return name


def data(archive: Path, folder: Path) -> Command:
    """Fetch the set into `folder` (its archive lies there, as npm left it) and prepare it with a learned tokenizer."""

    def command() -> int:
        use_data(folder)
        name = add_set(archive)
        kept = folder / "npm" / archive.name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.link(archive, kept)
        code = main(["data", "fetch", name])
        if code == 0:
            prepare(DataConfig(source=name, context=32, tokenizer="bpe", vocab_size=300))
        return code

    return command


def prepared(folder: Path) -> dict[str, Any]:
    """Hash of every file that is kept, by its place; what a kill left half-made is not among them."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and ".tmp-" not in str(p) and "requests" not in str(p))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---- compare ----


def compare(
    text: Path, folder: Path, data: Path, *more: str, prepare_process: Callable[[], None] | None = None
) -> Command:
    def command() -> int:
        use_data(data)
        if prepare_process is not None:
            prepare_process()
        words = [
            "compare",
            "--data",
            str(text),
            "--out",
            str(folder),
            "--context",
            "32",
            "--steps",
            "4",
            "--seeds",
            "2",
        ]
        changes = [f"{key}={value}" for key, value in SMALL.items()]
        return main([*words, "--workers", "2", "--attention", "softmax", "laser", *more, "--set", *changes])

    return command


def compared(folder: Path) -> dict[str, Any]:
    """What a finished comparison leaves: its results, and every run's weights and history."""
    runs = sorted((folder / "runs").glob("*/*"))
    return {
        "results": timeless(json.loads((folder / "results.json").read_text())),
        "runs": {str(run.relative_to(folder)): trained(run) for run in runs},
        "report": (folder / "report.html").exists(),
    }
