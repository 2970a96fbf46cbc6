"""Python's cyclic garbage collector, put off while many small values are made. Imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Put the cyclic collector off inside the block; also a decorator.

    A thousand layers are some hundred thousand values without a cycle. Each time their number has grown by a part, the
    collector walks through them and all of torch again and finds nothing: a quarter of the time of a prediction.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
