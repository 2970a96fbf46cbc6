"""The command line by task: train, evaluate and generate fit what a run was trained for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clearhead import cli

FIXTURES = Path(__file__).parent / "data" / "fixtures"
PAIRS, PLAYS = FIXTURES / "pairs" / "english-german.tsv", FIXTURES / "plays"
QUICK = ["--model", "tiny", "--model.width", "16", "--model.layers", "1", "--steps", "3", "--train.threads", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A translation run and a masked run of three steps each."""
    folder = tmp_path_factory.mktemp("runs")
    split = ["--data.val-fraction", "0.2", "--data.test-fraction", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_DATA", str(folder / "data"))
        pairs = ["--task", "translation", "--data", str(PAIRS), "--data.vocab-size", "300", "--context", "48", *split]
        assert cli.main(["train", "--out", str(folder / "pairs"), *pairs, *QUICK]) == 0
        text = ["--task", "masked_lm", "--data", str(PLAYS), "--context", "32", "--train.test-tokens", "500"]
        assert cli.main(["train", "--out", str(folder / "text"), *text, *QUICK]) == 0
    return folder


@pytest.fixture(autouse=True)
def _same_data(runs, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(runs / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def test_defaults_fit_the_task():
    plain, _ = cli.train_config(["--out", "x"])
    masked, _ = cli.train_config(["--out", "x", "--task", "masked_lm"])
    pairs, _ = cli.train_config(["--out", "x", "--task=translation"])
    assert (plain.task, plain.model.vocab_size, plain.data.source) == ("causal_lm", 257, "shakespeare")
    assert (masked.task, masked.model.vocab_size, masked.data.source) == ("masked_lm", 258, "shakespeare")
    assert (pairs.task, pairs.model.vocab_size, pairs.data.source) == ("translation", 4096, "verses-en-de")
    assert (pairs.train.label_smoothing, pairs.train.batch_size) == (0.1, 64)
    bpe, _ = cli.train_config(["--out", "x", "--task", "masked_lm", "--data.tokenizer", "bpe"])
    assert bpe.model.vocab_size == 4097


def test_translation_is_scored_and_translates(runs, capsys):
    assert cli.main(["evaluate", str(runs / "pairs"), "--json", "--split", "val", "--beams", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "translation"
    assert found["beams"] == 2
    assert 0 <= found["chrf"] <= 100
    assert found["pairs"] > 0
    assert found["examples"][0].keys() == {"source", "reference", "translation"}
    assert cli.main(["evaluate", str(runs / "pairs")]) == 0
    shown = capsys.readouterr().out
    assert "chrF" in shown
    assert "version:" in shown  # sacrebleu's signature
    assert cli.main(["generate", str(runs / "pairs"), "--prompt", "The house is old."]) == 0
    assert isinstance(capsys.readouterr().out, str)


def test_a_masked_run_is_scored_and_fills_in(runs, capsys):
    assert cli.main(["evaluate", str(runs / "text"), "--json", "--tokens", "400"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "masked_lm"
    assert 0 <= found["accuracy"] <= 1
    assert cli.main(["evaluate", str(runs / "text"), "--tokens", "400"]) == 0
    assert "nats per hidden token" in capsys.readouterr().out
    assert cli.main(["generate", str(runs / "text"), "--prompt", "To be, or n[MASK]t"]) == 0
    filled = capsys.readouterr().out.rstrip("\n")
    assert filled.startswith("To be, or n")
    assert filled.endswith("t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "x", "--task", "translatoin"], "did you mean 'translation'"),
        (["train", "--out", "x", "--data", "verses-en-de"], "a set of sentence pairs, not running text"),
        (["train", "--out", "x", "--task", "translation", "--data", "shakespeare"], "is running text"),
        (["train", "--out", "x", "--task", "translation", "--tokens", "1000"], "translation counts steps"),
        (["train", "--out", "x", "--train.beams", "4"], "train.beams is for translation; this run is causal_lm"),
        (["compare", "--set", "model.architecture=encoder"], "compare is about decoders"),
        (["compare", "--arm", "a:", "b: model.architecture=seq2seq"], "may not change model.architecture"),
        (["generate", "RUNS/pairs", "--prompt", "x", "--temperature", "2"], "--temperature means nothing"),
        (["generate", "RUNS/pairs"], "give the text to translate"),
        (["generate", "RUNS/pairs", "--prompt", "many words " * 40], "translate sentence by sentence"),
        (["generate", "RUNS/text", "--prompt", "no mask"], "write [MASK] for each hidden token (a byte)"),
        (["generate", "RUNS/text", "--prompt", "[MASK]", "--top-k", "3"], "takes the likeliest tokens"),
        (["evaluate", "RUNS/pairs", "--lengths", "8", "16"], "--lengths compares contexts"),
        (["evaluate", "RUNS/pairs", "--stride", "3"], "--stride means nothing for a translation run"),
        (["evaluate", "RUNS/pairs", "--split", "all"], "pairs are scored by split"),
        (["evaluate", "RUNS/text", "--beams", "3"], "--beams means nothing for a masked_lm run"),
    ],
)
def test_mistakes_are_one_line(runs, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.replace("RUNS", str(runs)) for word in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "x" / "config.json").exists()
