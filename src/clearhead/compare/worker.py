"""One run, in a process of its own: `python -m clearhead.compare.worker FOLDER PARENT`.

The folder's `task.json` holds the configuration. Ends with 0 when the run has a result (finished or diverged), with
`STOPPED` when it saved and stopped because it was asked to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from clearhead.compare.pool import SAVE_SECONDS, STOPPED
from clearhead.errors import UserError

PARENT_CHECK_SECONDS = 2.0
WAIT_SECONDS = 0.3


def main(folder: Path, parent: int) -> int:
    """Train in `folder`; stop, saving, when the parent process is gone."""
    threading.Thread(target=_stop_without, args=(parent,), daemon=True).start()
    from clearhead.train.config import RunConfig
    from clearhead.train.folder import InUse
    from clearhead.train.loop import train

    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    deadline = time.monotonic() + SAVE_SECONDS
    while True:
        try:
            result = train(RunConfig.from_dict(task["config"]), folder, progress=False)
        except InUse as error:  # by the worker of a command that was killed: it notices, saves, and lets go
            if time.monotonic() < deadline:
                time.sleep(WAIT_SECONDS)
                continue
            print(error, file=sys.stderr)
            return 2
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return STOPPED if result.status == "interrupted" else 0


def _stop_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
