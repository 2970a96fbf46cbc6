"""From a fine-tuned run to a folder of Hugging Face: weights with LoRA merged, or the adapter beside them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead._disk import disk_errors
from clearhead.data.pretrained_folder import pretrained_folder
from clearhead.errors import UserError

if TYPE_CHECKING:
    from clearhead.hf.model import Pretrained

ADAPTER = "adapter"
"""The folder inside that holds LoRA when it is not merged."""
BESIDE = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")
"""Files of the pretrained folder that a model needs to be used, and that training does not touch."""


def export_run(run: Path | str, target: Path | str, *, merge: bool = True) -> Path:
    """Write the newest model of a fine-tuning run as a Hugging Face folder, and return the folder.

    merge: True = LoRA's product is added to the matrices, so the folder needs no peft. False = the matrices stay as
        they were pretrained and LoRA goes to the folder `adapter` inside:
        `PeftModel.from_pretrained(clearhead.hf.load(folder), folder / "adapter")`.

    The folder opens with `clearhead.hf.load`, with the attention that it was trained with; without clearhead it opens
    as the plain architecture. Raises `UserError` when the target exists or the run is no fine-tuning run.
    """
    from clearhead.hf.model import Pretrained
    from clearhead.models.io import load_model
    from clearhead.train.checkpoint import newest_model

    model = load_model(newest_model(run))
    if not isinstance(model, Pretrained):
        raise UserError(f"{run}: a model of clearhead's own, not a pretrained one; clearhead.load_model reads it")
    export(model, Path(target), merge=merge)
    return Path(target)


def export(model: Pretrained, target: Path, *, merge: bool = True) -> None:
    """Write a model as `export_run` does. The module is taken apart: its LoRA is merged into it, or taken off it."""
    if target.exists():
        raise UserError(f"{target} exists; choose a new folder, nothing there was touched")
    inner: Any = model.model.float()  # a product added to bf16 matrices would be rounded away in part
    with _appearing(target) as building:
        if model.adapter is not None:
            if not merge:
                model.adapter.save_pretrained(building / ADAPTER)
            inner = model.adapter.merge_and_unload() if merge else model.adapter.unload()
        inner.eval().save_pretrained(building)
        source = pretrained_folder(model.config.source)
        for pattern in BESIDE:
            for path in source.glob(pattern):
                shutil.copyfile(path, building / path.name)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give a folder that becomes `target` when the block ends well, and vanishes otherwise."""
    with disk_errors(str(target), "nothing was written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield building
            building.chmod(0o755)
            os.rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
