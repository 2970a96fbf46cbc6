"""`clearhead hf list`: a table made by running, kept cell by cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from clearhead.cli import main
from clearhead.errors import UserError
from clearhead.hf import listing
from clearhead.hf.listing import Cell, Table, make_table, markdown, notes, try_cell
from clearhead.hf.zoo_entries import ENTRIES, Entry


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The cells that are made, none of them by running."""
    made: list[tuple[str, str]] = []

    def pretend(entry: Entry, spec: str) -> Cell:
        made.append((entry.name, spec))
        return Cell(entry.name, spec, "works", "", ("unpatch",))

    monkeypatch.setattr(listing, "try_cell", pretend)
    return made


def test_cells_that_are_kept_are_not_made_again(counted: list[tuple[str, str]], tmp_path: Path) -> None:
    keep = tmp_path / "cells.json"
    make_table(["llama", "bert"], ["softmax"], keep=keep)
    table = make_table(["llama"], ["laser", "softmax"], keep=keep)
    assert counted == [("llama", "softmax"), ("bert", "softmax"), ("llama", "laser")]
    assert list(table.cells) == [("llama", "laser"), ("llama", "softmax")]
    assert len(json.loads(keep.read_text())["cells"]) == 3


def test_cells_of_other_source_are_made_again(
    counted: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "cells.json"
    make_table(["llama"], ["softmax"], keep=keep)
    old = listing.versions()
    monkeypatch.setattr(listing, "versions", lambda: old | {"source": "other"})
    make_table(["llama"], ["softmax"], keep=keep)
    assert len(counted) == 2


def test_what_was_done_before_a_stop_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at_bert(entry: Entry, spec: str) -> Cell:
        if entry.name == "bert":
            raise KeyboardInterrupt
        return Cell(entry.name, spec, "works")

    monkeypatch.setattr(listing, "try_cell", stop_at_bert)
    keep = tmp_path / "cells.json"
    with pytest.raises(KeyboardInterrupt):
        make_table(["llama", "bert"], ["softmax"], keep=keep)
    assert [cell["architecture"] for cell in json.loads(keep.read_text())["cells"]] == ["llama"]


def test_a_file_of_another_kind_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text("[]")
    with pytest.raises(UserError, match="not a file that `clearhead hf list --json` wrote"):
        make_table(["llama"], ["softmax"], keep=tmp_path / "cells.json")


def test_reasons_are_numbered_once() -> None:
    cells = [
        Cell("llama", "laser", "refused", "because"),
        Cell("bert", "laser", "refused", "because"),
        Cell("bert", "softmax", "fails", "padding edit: seen"),
        Cell("llama", "softmax", "works"),
    ]
    versions = {"transformers": "5.0", "torch": "2.0", "source": ""}
    table = Table(versions, {(cell.architecture, cell.spec): cell for cell in cells})
    assert notes(table) == {"because": 1, "padding edit: seen": 2}
    page = markdown(table)
    assert "| llama | LlamaForCausalLM | refused (1) | works |" in page
    assert "| bert | BertForMaskedLM | refused (1) | FAILS (2) |" in page
    assert "\n1. because\n2. padding edit: seen\n" in page
    assert "**works** (1 cells of 4)" in page


def test_a_broken_patch_is_a_failure_and_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from clearhead.hf import masks, patching

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    def blind(valid_bm: object) -> masks.Mask:
        return masks.Mask()

    with monkeypatch.context() as context:
        context.setattr(patching, "_discover", crash)
        assert try_cell(ENTRIES["llama"], "laser") == Cell(
            "llama", "laser", "fails", "patch raised RuntimeError: boom", ()
        )
    with monkeypatch.context() as context:
        context.setattr(patching.probes, "run", crash)
        cell = try_cell(ENTRIES["llama"], "laser")
        assert cell.status == "fails"
        assert "the probing forward of LlamaForCausalLM failed (RuntimeError: boom)" in cell.reason
    monkeypatch.setattr(masks, "hide_keys", blind)
    cell = try_cell(ENTRIES["llama"], "laser")
    assert cell.status == "fails"
    assert "padding edit: left padding is seen" in cell.reason
    assert "own attention" not in cell.reason


def test_what_the_models_own_attention_fails_as_well_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from clearhead.hf import checks

    monkeypatch.setattr(listing, "_OWN", {})
    monkeypatch.setitem(checks.BEHAVIOUR, "future edit", lambda model, entry: "a later token is seen")
    cell = try_cell(ENTRIES["llama"], "laser")
    assert cell.status == "as own"
    assert cell.reason == "future edit: a later token is seen (its own attention fails this check as well)"


# ---- the command ----


def test_the_command_prints_a_table_and_writes_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "cells.json"
    arguments = ["hf", "list", "--architecture", "gpt_oss", "vit", "--spec", "softmax", "laser"]
    assert main([*arguments, "--markdown", str(page), "--json", str(kept)]) == 0
    shown = capsys.readouterr().out
    import torch
    import transformers

    assert f"transformers {transformers.__version__}, torch {torch.__version__}" in shown
    assert "3 works, 1 refused" in shown
    assert "sink in each row" in shown
    assert "| gpt_oss | GptOssForCausalLM | works | refused (1) |" in page.read_text()
    assert "## Images" in page.read_text()
    assert {cell["status"] for cell in json.loads(kept.read_text())["cells"]} == {"works", "refused"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["hf", "list", "--architecture", "lama"], "did you mean 'llama'"),
        (["hf", "list", "--spec", "lazer"], "did you mean 'laser'"),
        (["hf", "lst"], "unknown action of hf 'lst' (did you mean 'list'?)"),
        (["hf", "list", "--markdown", "."], "is a folder; name a file"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert text in told
    assert told.count("\n") == 1


def test_without_transformers_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["hf", "list"]) == 2
    assert "pip install 'clearhead[hf]'" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf", "--help"]) == 0
    assert "clearhead hf list --architecture llama bert t5" in capsys.readouterr().out
    assert main(["hf"]) == 2
