"""The pages that say how to adopt clearhead do what they say: each Python block runs, each command is one."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from clearhead import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("adopt-*.md"), DOCS / "lm-eval.md", DOCS / "positions.md"])
NEEDS = {
    "adopt-timm.md": ("timm",),
    "adopt-hugging-face.md": ("transformers",),
    "lm-eval.md": ("lm_eval", "transformers", "accelerate"),
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:    |\$ )?(clearhead (?!COMMAND).*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDS.get(page.name, ()):
        try:
            importlib.import_module(name)
        except Exception as error:  # absent, or broken: a torchvision that does not fit the torch beside it
            pytest.skip(f"{name}: {error}")
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} shows no code"
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)  # errors name the line of the page


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found in COMMAND.finditer(page.read_text(encoding="utf-8")):
            yield page.name, found[1].split("  #")[0].strip()


@pytest.mark.parametrize(("page", "command"), list(commands()), ids=lambda value: value[:60])
def test_commands_exist_with_their_options(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *arguments = shlex.split(command)
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    told = capsys.readouterr().out
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{re.escape(flag.partition('=')[0])}\b", told), f"{page}: {command} has no {flag}"
