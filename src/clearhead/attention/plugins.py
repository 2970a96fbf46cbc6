"""Mechanisms from a user's own file: `CLEARHEAD_PLUGINS=my_attention.py` (several joined as in PATH).

The file registers its terms when it runs (`attention/spec.py`, `register`), as `docs/examples/softmax_one.py` does. An
environment variable, so that worker processes of a comparison know the same terms. In Python, importing the file is
enough.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from clearhead.errors import UserError

VARIABLE = "CLEARHEAD_PLUGINS"


def load_plugins() -> None:
    """Run the files that the environment names, each once. Raises `UserError` when one is missing or fails."""
    for text in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(text).resolve()
        name = f"clearhead_plugin_{path.stem}_{abs(hash(str(path)))}"
        if name in sys.modules:
            continue
        if not path.is_file():
            raise UserError(f"{VARIABLE}: no such file: {text}")
        specification = importlib.util.spec_from_file_location(name, path)
        if specification is None or specification.loader is None:
            raise UserError(f"{VARIABLE}: {text} is not a Python file")
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"{VARIABLE}: {text} failed: {type(error).__name__}: {error}") from error
