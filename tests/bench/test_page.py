"""The page is a function of the records, and says what they say."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from clearhead.bench.disturbance import disturbances
from clearhead.bench.page import make_page, read_record
from clearhead.bench.targets import TARGETS, verdicts
from clearhead.errors import UserError
from tests.bench.records import attention_group, group, record, result, step_group

GOOD = record(
    attention_group(512, laser=1.05, self_adjust=1.2, written_out=2.0),
    attention_group(1024, laser=1.09, self_adjust=1.4, written_out=3.0),
    attention_group(2048, laser=1.30, self_adjust=1.6, written_out=3.0),
    step_group(laser=1.01, softmax_plus_selective=1.2, self_adjust=1.1),
)


def words_of(found):
    return {verdict.target.words.split(",")[0] + verdict.limit: verdict.words for verdict in verdicts(found)}


def test_targets_are_judged_by_the_median_at_each_length():
    found = words_of(GOOD)
    assert found["laser≤ 1.10"] == "missed at 2048"
    assert found["self_adjust≤ 2.00"] == "met"
    assert found["self_adjust≤ 1.50"] == "missed at 2048"
    assert found["self_adjust written out≥ 2.00"] == "missed at 2048"  # 512 does not count: 1024 and longer do
    assert found["softmax+selective≤ 1.05"] == "not measured"
    assert found["training step with softmax+selective≤ 1.05"] == "missed"
    assert found["training step with self_adjust≤ 1.15"] == "met"
    assert len(found) == len(TARGETS)


@pytest.mark.parametrize("plan", [{"device": "cuda"}, {"dtype": "bfloat16"}])
def test_the_marks_are_for_a_cpu_in_float32(plan):
    other = GOOD | {"plan": GOOD["plan"] | plan}
    assert verdicts(other) == []
    assert "The marks are for a CPU in float32." in make_page({"a.json": other}, "x.md").text


def test_the_page_is_the_same_twice_and_changes_with_the_record():
    page = make_page({"a.json": GOOD}, "docs/bench.md")
    again = make_page({"a.json": json.loads(json.dumps(GOOD))}, "docs/bench.md")
    assert page == again
    other = json.loads(json.dumps(GOOD))
    other["groups"][0]["results"]["laser"]["median_ratio"] = 7.77
    assert "7.77" in make_page({"a.json": other}, "docs/bench.md").text


def test_the_page_names_its_command_its_figures_and_every_row():
    page = make_page({"benchmarks/results/a.json": GOOD}, "docs/bench.md")
    assert "    clearhead bench --page docs/bench.md --from benchmarks/results/a.json\n" in page.text
    assert set(re.findall(r"\(images/(.*?)\)", page.text)) == set(page.figures)
    assert set(page.figures) == {"bench-forward-backward.svg", "bench-step.svg"}
    for row in ("| **laser** | 1.05", "| laser written out |", "| torch sdpa | 1 (1e+03 ms)", "laser, to 3e-07"):
        assert row in page.text
    assert "load 0.10 before and 1.00 after" in page.text
    assert "| **laser** | 5.0 |" in page.text  # peak memory


def test_a_rival_that_is_faster_is_named_and_one_that_is_not_is_not():
    text = make_page({"a.json": GOOD}, "x.md").text
    section = text.split("### Who is faster than us")[1].split("###")[0]
    assert "laser written out (1.20 against 1.31)" in section  # at 2048
    assert section.count("laser written out") == 1
    assert "self_adjust written out" not in section
    alone = make_page({"a.json": record(attention_group(512, 1.0, 1.0, 9.0))}, "x.md").text
    assert "Nobody who computes the same" in alone


def test_what_is_missing_stands_on_the_page():
    absent = {
        "name": "x-transformers, flash", "source": "x-transformers", "family": "softmax", "equals": "softmax",
        "beside": "", "note": "", "status": "not installed", "reason": "pip install 'clearhead[bench]'",
    }  # fmt: skip
    one = group("forward", 512, {"torch sdpa": result(1.0, 1.0, source="torch")}, absent=[absent])
    text = make_page({"a.json": record(one)}, "x.md").text
    assert "- x-transformers (forward): not installed; `pip install 'clearhead[bench]'`" in text


def test_several_records_are_sections_with_figures_of_their_own():
    page = make_page({"a.json": GOOD, "b.json": GOOD}, "bench.md")
    assert page.text.count("\n## a processor, 2026-01-02") == 2
    assert len(page.figures) == 4


def test_figures_are_well_formed_and_show_every_row():
    page = make_page({"a.json": GOOD}, "bench.md")
    for svg in page.figures.values():
        ElementTree.fromstring(svg)
    assert "laser written out" in page.figures["bench-forward-backward.svg"]
    assert "softmax+selective" in page.figures["bench-step.svg"]
    one = make_page({"a.json": record(attention_group(512, 1, 1, 1))}, "b.md")  # one length, all ratios alike
    ElementTree.fromstring(one.figures["b-forward-backward.svg"])


def test_a_machine_that_is_not_quiet_is_said():
    assert disturbances(GOOD) == []
    shared = attention_group(512, 1, 1, 1) | {"cpu_share": 0.5}
    busy = record(shared, load_before=[3.0, 1.0, 1.0], plan={"device": "cpu", "dtype": "float32", "rounds": 3})
    found = disturbances(busy)
    assert len(found) == 3
    text = make_page({"a.json": busy}, "x.md").text
    for words in found:
        assert f"> Not a quiet machine: {words}." in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a record"),
        ('{"what": "another"}', "not a record"),
        ('{"what": "clearhead bench", "format": 0}', "expected format 1, got 0"),
    ],
)
def test_what_is_no_record_is_refused_in_a_line(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        read_record(path)
    assert words in str(refused.value)
