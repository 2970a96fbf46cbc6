"""`clearhead bench` at the command line."""

import importlib.util
import json
import shlex
import subprocess
import sys

import pytest

from clearhead import cli
from clearhead._arguments import merge, parse
from clearhead._bench_command import LISTS, Bench, _plan
from tests.bench.records import attention_group, record


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def bench(*arguments):
    try:
        return cli.main(["bench", *arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "lasr"], "did you mean 'laser'?"),
        (["--operation", "forwards"], "unknown operation 'forwards' (did you mean 'forward'?)"),
        (["--rival", "x-transformer"], "(did you mean 'x-transformers'?)"),
        (["--rival", "none", "nanogpt"], "--rival none goes alone"),
        (["--model", "tiny"], "unknown model 'tiny'"),
        (["--length", "1"], "lengths of at least 2"),
        (["--length", "64", "--operation", "step"], "--length is about attentions"),
        (["--model", "small", "--operation", "forward"], "--model is about training steps"),
        (["--rounds", "1"], "at least 3 rounds"),
        (["--heads", "0"], "at least 1"),
        (["--device", "gpu"], "expected auto, cpu, cuda"),
        (["--save"], "benchmarks/results, which is not here"),
        (["--save", "--out", "a.json"], "give one of them"),
        (["--out", "."], "is a folder; name a file"),
        (["--from", "a.json"], "--from goes with --page"),
        (["--from", "a.json", "--page", "x.md"], "a.json: cannot be read"),
        (["--from", "a.json", "--page", "x.md", "--quick"], "leave the other options out"),
    ],
)
def test_wrong_use_is_one_clear_line(arguments, words, capsys):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1
    assert words in lines[0]


def test_the_examples_are_valid():
    for line in filter(None, map(str.strip, Bench.EXAMPLES.splitlines())):
        asked = parse(Bench, "bench", merge(shlex.split(line)[2:], *LISTS))
        if not asked.records:
            assert _plan(asked).groups()


def test_a_list_option_given_twice_means_both():
    asked = parse(Bench, "bench", merge(["--attention", "laser", "--attention", "softmax"], *LISTS))
    assert asked.attention == ("laser", "softmax")


def test_list_and_page_need_no_torch(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record(attention_group(512, 1.0, 1.2, 3.0))))
    for arguments in (["--list"], ["--from", "a.json", "--page", "pages/x.md"]):
        code = (
            "import sys\nfrom clearhead.cli import main\n"
            f"code = main(['bench', *{arguments!r}])\nassert 'torch' not in sys.modules\nsys.exit(code)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "pages" / "x.md").exists()
    assert (tmp_path / "pages" / "images" / "x-forward-backward.svg").exists()


def test_list_says_what_is_not_installed(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "x_transformers" else real(name, *a)
    )
    assert bench("--list") == 0
    text = capsys.readouterr().out
    assert "NOT INSTALLED: pip install 'clearhead[bench]'" in text
    for name in ("torch sdpa", "nanoGPT-style, sdpa", "x-transformers laser, no flash", "self_adjust written out"):
        assert name in text


def test_a_bench_is_measured_written_and_made_into_a_page(tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "x_transformers" else real(name, *a)
    )
    arguments = [
        "--operation", "forward", "--attention", "softmax", "laser", "--length", "32", "64", "--heads", "2",
        "--head-dim", "16", "--rounds", "3", "--no-memory", "--rival", "written-out", "x-transformers",
    ]  # fmt: skip
    assert bench(*arguments, "--out", "results/a.json", "--page", "docs/x.md") == 0
    shown = capsys.readouterr().out
    assert "load before:" in shown
    assert "x-transformers, flash: not installed: pip install 'clearhead[bench]'" in shown
    assert "written: results/a.json" in shown
    found = json.loads((tmp_path / "results" / "a.json").read_text())
    assert found["machine"]["threads"] == 1
    assert {one["status"] for one in found["groups"][0]["absent"]} == {"not installed"}
    page = (tmp_path / "docs" / "x.md").read_text()
    assert "--from results/a.json" in page
    made = sorted((tmp_path / "docs" / "images").iterdir())
    assert [path.name for path in made] == ["x-forward.svg"]
    before = page
    assert bench("--page", "docs/x.md", "--from", "results/a.json") == 0
    assert (tmp_path / "docs" / "x.md").read_text() == before


def test_json_is_all_that_is_printed_when_asked_for(capsys):
    arguments = ["--operation", "decode", "--attention", "softmax", "--length", "32", "--heads", "1", "--head-dim", "8"]
    assert bench(*arguments, "--rival", "none", "--rounds", "3", "--no-memory", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["groups"][0]["results"]) == ["torch sdpa", "softmax"]
