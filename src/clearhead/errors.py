"""Errors that a user caused and can mend: one clear line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in input, configuration or files; the command line prints it as one line and exits with 2."""


class PeerLost(UserError):
    """Another process of those that train together is gone. Only a new start helps."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest choice, or an empty string when nothing is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is not among `choices`, with the nearest one and the full list."""
    names = list(choices)
    return UserError(f"unknown {kind} {name!r}{nearest(name, names)}; known: {', '.join(names)}")
