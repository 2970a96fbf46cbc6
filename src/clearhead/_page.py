"""What the two reports share: palette, page template, marked numbers, a safe way to write a file. Imports no torch.

A report is one self-contained page: plotly.js, styles and data are inside, nothing is fetched. Each number in its text
is put there by `Figures`, with the path of its source in the markup, so that a test (and a reader) can hold one against
the other. The templates `_page.css.j2` and `_page.js.j2` carry the common look and the plots' common manners.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from clearhead._disk import write_whole

ABSENT = "n/a"

# Okabe and Ito's palette, told apart by people with every common colour blindness; light and dark page.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f5793a"),
    ("#009e73", "#2fc99d"),
    ("#b0568c", "#e39cc4"),
    ("#8a6d00", "#e6c229"),
    ("#5b4bb7", "#a99bf0"),
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def write(path: Path, text: str) -> None:
    """Write to a temporary name and rename it: a reader sees the old file or the new one."""
    write_whole(path, text)


class Figures:
    """Puts numbers on the page: `figure("arms.1.test.mean", "bits")` looks the path up and marks where it came from."""

    def __init__(self, results: Mapping[str, Any], formats: Mapping[str, Callable[[Any], str]]) -> None:
        self.results = results
        self.formats = formats

    def value(self, path: str) -> Any:
        """Return what stands at a path of keys and list indices; None when a part of it is None or missing."""
        found: Any = self.results
        for key in path.split("."):
            if isinstance(found, list):
                found = found[int(key)]
            elif isinstance(found, Mapping):
                found = found.get(key)
            else:
                return None
        return found

    def figure(self, path: str, form: str = "text", absent: str = ABSENT) -> Markup:
        """Return the formatted value as a span that names its path and format."""
        value = self.value(path)
        if value is None:
            return Markup('<span class="absent">{}</span>').format(absent)
        return Markup('<span data-ref="{}" data-format="{}">{}</span>').format(path, form, self.formats[form](value))


def render(template: str, **values: Any) -> str:
    """Return the page of a template, named from the package's folder, with plotly's own source as `plotly`."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clearhead", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly = Markup(get_plotlyjs().replace("</script", "<\\/script"))
    return environment.get_template(template).render(plotly=plotly, **values)


def embedded(values: Any) -> Markup:
    """Return values as strict JSON that may stand inside a script element."""
    # "<" inside a script element could end it; JSON may write it as an escape.
    return Markup(json.dumps(values, allow_nan=False, separators=(", ", ": ")).replace("<", "\\u003c"))
