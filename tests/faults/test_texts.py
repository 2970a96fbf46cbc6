"""Texts of every sort where a person may write something: specs, arms, options, config files, data. `UserError`, in one
line, or success; never another exception."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from clearhead.attention.spec import REGISTRY, AttentionSpec
from clearhead.cli import train_config
from clearhead.compare.arms import Arm, known_keys, with_changes
from clearhead.compare.plan import ComparePlan
from clearhead.data.config import DataConfig
from clearhead.data.text import prepare
from clearhead.data.tokenizer import load_tokenizer
from clearhead.errors import UserError
from clearhead.models.io import read_stored_config
from clearhead.train.config import RunConfig, TrainConfig
from clearhead.train.folder import read_config
from tests.faults.told import fault

MANY = int(os.environ.get("CLEARHEAD_CASES", "10000")) // 20
BASE = RunConfig(train=TrainConfig(steps=1000))

WORDS = (
    *REGISTRY, "form", "size", "features", "kernel", "product", "relu", "true", "none", "-1", "0", "1", "64", "1e400",
    "nan", "inf", "0x10", "1_000", "\u0663", "9" * 30, "9" * 5000, "", " ", "\x00", "\ud800", "é", "softmax ",
)  # fmt: skip
word = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
glued = st.lists(st.tuples(word, st.sampled_from(("+", ":", ",", "=", "", " "))), max_size=6).map(
    lambda pairs: "".join(a + b for a, b in pairs)
)
value = st.one_of(word, st.integers().map(str), st.floats().map(str), st.text(max_size=20))
changes = st.dictionaries(
    st.one_of(st.sampled_from(known_keys(BASE)), st.text(max_size=12)), value, min_size=1, max_size=2
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def spoiled(draw: Any) -> dict[str, Any]:
    """A run's configuration with one value replaced, removed or added."""
    values: dict[str, Any] = json.loads(json.dumps(BASE.to_dict()))
    section = draw(st.sampled_from([*values, "other"]))
    if draw(st.integers(0, 5)) == 0 or section == "other":
        values[section] = draw(plain)
        return values
    key = draw(st.sampled_from([*values[section], "other"]))
    if draw(st.integers(0, 5)) == 0:
        values[section].pop(key, None)
    else:
        values[section][key] = draw(plain)
    return values


texts = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from((b"", b"\n\n\n", b"\xef\xbb\xbf", b"\xff\xfea\x00", b"\x00" * 50, b"a" * 70_000, b"word " * 400)),
    st.lists(plain.map(lambda x: json.dumps({"text": x}).encode()), max_size=4).map(b"\n".join),
    st.lists(st.text(max_size=30).map(lambda x: json.dumps({"text": x * 9}).encode()), max_size=9).map(b"\n\n".join),
    st.just(b">one\n" + b"ACGT" * 300 + b"\n>two\nACGN\n"),
)
endings = st.sampled_from((".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".fna", ".faa.gz", ".fa", ".csv", ""))


def user_error_or(action: Callable[[], object], count: Counter[str]) -> None:
    told = ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            action()
    except UserError as error:
        told = str(error)
    except SystemExit as stopped:  # tyro's own refusal of an option
        told = f"tyro's own refusal, exit code {stopped.code}"
    count["refused" if told else "taken"] += 1
    if told:
        assert len(told) > 10
        assert "Traceback" not in told
        assert not told.startswith("tyro") or told.endswith(" 2")


def drawn(number: int, strategy: Any, check: Callable[[Any], None]) -> None:
    @seed(2026)
    @settings(
        max_examples=number, phases=[Phase.generate, Phase.shrink], deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def test(x: Any) -> None:
        check(x)

    test()


CASES = pytest.mark.parametrize("cases", [40, pytest.param(MANY, marks=pytest.mark.full, id=f"{MANY}")])


@fault("{case} attention specs and arms of any text", "read, or one line; what is read prints as it was read")
@CASES
def test_specs_and_arms(cases):
    count: Counter[str] = Counter()

    def check(text: str) -> None:
        user_error_or(lambda: _again(AttentionSpec.parse(text)), count)
        user_error_or(lambda: Arm.parse(text).apply(BASE), count)
        user_error_or(lambda: Arm.parse(f"a: model.attention={text}").apply(BASE), count)

    drawn(cases, glued, check)
    assert count["refused"]


def _again(spec: AttentionSpec) -> None:
    assert AttentionSpec.parse(str(spec)) == spec


@fault("{case} values of any text for options and --set", "taken, or one line")
@CASES
def test_options(cases):
    count: Counter[str] = Counter()

    def check(asked: dict[str, str]) -> None:
        user_error_or(lambda: with_changes(BASE, asked), count)
        user_error_or(lambda: ComparePlan.build(overrides=[f"{k}={v}" for k, v in asked.items()]), count)

    drawn(cases, changes, check)
    assert min(count.values()) > 0, count


@fault("{case} values of any text on the command line of train", "taken, or one line (tyro's box for its own)")
@CASES
def test_command_line(cases):
    count: Counter[str] = Counter()
    keys = st.sampled_from([f"--{key.replace('_', '-')}" for key in known_keys(BASE)] + ["--steps", "--data", "--task"])

    def check(asked: tuple[str, str]) -> None:
        user_error_or(lambda: train_config(["--out", "x", *asked]), count)

    drawn(max(10, cases // 10), st.tuples(keys, value), check)
    assert count["refused"]


@fault("{case} config files with anything in them", "read, or one line that names the file")
@CASES
def test_config_files(cases, tmp_path):
    count: Counter[str] = Counter()

    def check(values: Any) -> None:
        data = values if isinstance(values, bytes) else json.dumps(values).encode()
        (tmp_path / "config.json").write_bytes(data)
        user_error_or(lambda: read_config(tmp_path), count)
        (tmp_path / "config.json").write_bytes(
            data if isinstance(values, bytes) else json.dumps(values.get("model")).encode()
        )
        user_error_or(lambda: read_stored_config(tmp_path), count)
        plan = {**PLAN, "base": values} if isinstance(values, dict) else values
        (tmp_path / "plan.json").write_bytes(plan if isinstance(plan, bytes) else json.dumps(plan).encode())
        user_error_or(lambda: ComparePlan.load(tmp_path), count)

    drawn(cases, st.one_of(spoiled(), st.binary(max_size=30)), check)
    assert min(count.values()) > 0, count


PLAN = json.loads(ComparePlan.build(attention=["softmax", "laser"]).to_json())


@fault("{case} plans and tokenizers with anything in them", "read, or one line that names the file")
@CASES
def test_plans_and_tokenizers(cases, tmp_path):
    count: Counter[str] = Counter()

    def check(asked: tuple[str, Any]) -> None:
        key, held = asked
        (tmp_path / "plan.json").write_text(json.dumps({**PLAN, key: held}))
        user_error_or(lambda: ComparePlan.load(tmp_path), count)
        (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "bytes", "format": 1, key: held}))
        user_error_or(lambda: load_tokenizer(tmp_path / "tokenizer.json"), count)

    drawn(cases, st.tuples(st.sampled_from([*PLAN, "kind", "vocab_size", "merges"]), plain), check)
    assert count["refused"]


@fault("{case} data files of any bytes, under any ending", "prepared, or one line that names the file")
@CASES
def test_data_files(cases, tmp_path, monkeypatch):
    count: Counter[str] = Counter()
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "data"))

    def check(asked: tuple[bytes, str, str, bool]) -> None:
        data, ending, tokenizer, packed = asked
        path = tmp_path / f"own{ending}"
        path.write_bytes(gzip.compress(data) if packed and ending.endswith(".gz") else data)
        config = DataConfig(
            source=str(path), context=8, tokenizer=tokenizer, vocab_size=270, val_fraction=0.2, test_fraction=0.2
        )
        user_error_or(lambda: prepare(config), count)
        path.unlink()

    kinds = st.sampled_from(("bytes", "bytes", "bpe", "dna"))
    drawn(cases, st.tuples(texts, endings, kinds, st.booleans()), check)
    assert min(count.values()) > 0, count


def test_a_data_folder_of_odd_things(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "data"))
    own = tmp_path / "own"
    (own / "a.txt").mkdir(parents=True)
    os.symlink(own / "nowhere.txt", own / "b.txt")
    os.mkfifo(own / "c.txt")
    with pytest.raises(UserError, match="holds no text"):
        prepare(DataConfig(source=str(own), context=8))
    with pytest.raises(UserError, match="neither a file nor a folder"):
        prepare(DataConfig(source=str(Path(own / "c.txt")), context=8))
