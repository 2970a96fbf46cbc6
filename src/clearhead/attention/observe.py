"""Looking on at `attend`: functions that are shown every call, after all has been decided and before it runs.

The measurement of clearhead.signal stands here. A watcher must neither change nor keep the call's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clearhead.attention.call import Call

WATCHERS: list[Callable[[Call], object]] = []


@contextmanager
def watching(watcher: Callable[[Call], object]) -> Iterator[None]:
    """Show every call of `attend` to `watcher` inside a `with` block."""
    WATCHERS.append(watcher)
    try:
        yield
    finally:
        WATCHERS.remove(watcher)
