"""The page and inspect.json on MADE-UP reports: every number is the report's, and the page stands alone."""

from __future__ import annotations

import fnmatch
import math
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clearhead._page import Figures
from clearhead.errors import UserError
from clearhead.signal import view, words
from clearhead.signal.findings import KINDS, Report
from clearhead.signal.report import FORMATS, MARKED, columns, write_report
from clearhead.signal.stored import plain, read
from clearhead.signal.trace import Trace
from tests.page import Page, strict
from tests.signal.made_reports import CASES, finding, report, trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Report, Path]]:
    root = tmp_path_factory.mktemp("reports")
    reports = {name: make() for name, make in CASES.items()}
    return {name: (one, write_report(one, root / str(place))) for place, (name, one) in enumerate(reports.items())}


def embedded(path: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert found
    return strict(found[1])


@pytest.mark.parametrize("case", CASES)
def test_every_figure_of_the_page_stands_in_the_data_embedded_in_it(made, case):
    _, path = made[case]
    page, look = Page(path.read_text()), Figures(embedded(path), FORMATS)
    assert len(page.figures) > 30
    for where, form, shown in page.figures:
        assert look.value(where) is not None, where
        assert shown == FORMATS[form](look.value(where)), where


def expected(found: Trace, stack: str, row: dict[str, Any], key: str) -> float | None:
    """A few quantities, looked up by the tap's name and so by another way than the page's."""
    places = {"embedding": "embedding", "output": "output", "behind the final norm": "normed", "logits": "logits"}
    if row["layer"] is None:
        name = {"input": "logits" if row["part"] == "logits" else f"{stack}.{places[row['part']]}"}
    else:
        start = f"{stack}.{row['layer']}.{row['part']}"
        name = {place: f"{start}.{place}" for place in ("input", "branch", "sum", "normed")}
    taps = {place: next((tap for tap in found if tap.name == full), None) for place, full in name.items()}
    entrance, branch = taps.get("input"), taps.get("branch")
    stats = branch.attention if branch else None
    if key == "stream_variance":
        return entrance.forward.variance if entrance and entrance.forward else None
    if key == "correlation":
        if entrance is None or entrance.forward is None:
            return None
        spread = entrance.forward.variance
        return entrance.forward.covariance / spread if math.isfinite(spread) else math.nan
    if key == "gradient_variance":
        return entrance.backward.variance if entrance and entrance.backward else None
    if key == "score_deviation":
        return stats.score_variance**0.5 if stats else None
    if key == "entropy_share":
        return stats.entropy / stats.uniform_entropy if stats else None
    if key == "parameter_gradient":
        return branch.parameter_gradient if branch else None
    return branch.matrix_gradients.get(key.removeprefix("matrix.")) if branch else None


@pytest.mark.parametrize("case", CASES)
def test_the_columns_are_the_numbers_of_the_taps(made, case):
    one, path = made[case]
    data = embedded(path)
    assert data == columns(one)
    keys = ("stream_variance", "correlation", "gradient_variance", "score_deviation", "entropy_share",
            "parameter_gradient", "matrix.query", "matrix.down")  # fmt: skip
    compared = 0
    for stack in data["stacks"]:
        for source, found in view.traces_of(one).items():
            for key in keys:
                for i, row in enumerate(stack["rows"]):
                    wanted = expected(found, stack["name"], row, key)
                    got = stack["values"].get(key, {}).get(source, [None] * len(stack["rows"]))[i]
                    if wanted is None:
                        assert got is None, (source, key, row)
                    else:
                        assert float(got) == pytest.approx(wanted, nan_ok=True), (source, key, row)
                    compared += wanted is not None
    assert compared > 20


def test_every_number_of_every_tap_is_in_some_column(made):
    one, path = made["24 layers, post-norm"]
    shown = {v for s in embedded(path)["stacks"] for c in s["values"].values() for col in c.values() for v in col}
    for found in view.traces_of(one).values():
        for tap in found:
            assert tap.forward is None or tap.forward.variance in shown, tap.name
            assert tap.parameter_gradient is None or tap.parameter_gradient in shown, tap.name
            assert set(tap.matrix_gradients.values()) <= shown, tap.name
            assert tap.effective_rank is None or tap.effective_rank in shown, tap.name
            if tap.attention is not None:
                stats = tap.attention
                assert {stats.entropy, stats.largest_weight, stats.jacobian_gain, stats.effective_rank} <= shown


@pytest.mark.parametrize("case", CASES)
def test_inspect_json_is_strict_and_reads_back(made, case):
    one, path = made[case]
    strict((path.parent / "inspect.json").read_text())
    for back in (read(path.parent), read(path.parent / "inspect.json")):
        assert repr(back.predicted) == repr(one.predicted)  # repr, since NaN differs from itself
        assert repr(back.measured) == repr(one.measured)
        assert [advice.predicted for advice in back.advice] == [advice.predicted for advice in one.advice]
        assert repr(back.findings) == repr(one.findings)
        assert repr(back) == repr(one)


def test_numbers_that_json_does_not_know_are_written_as_strings():
    values = plain(
        {"a": math.nan, "b": (math.inf, -math.inf), "c": np.float32(1.5), "d": np.int64(3), "e": Path("x/y")}
    )
    assert values == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 1.5, "d": 3, "e": "x/y"}
    assert plain([True, None, "NaN", np.array([1.0, np.nan]), {1: {"x"}}]) == [
        True, None, "NaN", [1.0, "NaN"], {"1": ["x"]},
    ]  # fmt: skip


def test_reading_something_else_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "inspect.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read(tmp_path)
    for other in ("{}", "[]", '{"title": "x", "predicted": 3}'):
        (tmp_path / "inspect.json").write_text(other)
        with pytest.raises(UserError, match="not an inspection"):
            read(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_the_page_stands_alone_and_shows_nothing_undefined(made, case):
    text = made[case][1].read_text()
    page = Page(text)
    assert not re.search(r"\b(nan|NaN|None|inf|Infinity|null)\b", page.text)
    assert all(link.startswith("#") or link == "data:," for link in page.links), page.links
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    head = text.split("<script", 1)[0]
    assert "@import" not in head
    assert "url(" not in head
    assert text.count("plotly.js v") == 1


def test_names_are_shown_as_they_are_and_never_become_markup(made):
    one, path = made["hostile names"]
    page = Page(path.read_text())
    assert one.title in page.text
    assert "<img src=x>[red]" in page.text
    assert "[bold]<b>&" in page.text
    assert one.advice[0].command in page.text
    assert "x" not in page.links


def test_verdict_and_remedy_come_before_the_figures(made):
    one, path = made["192 layers"]
    text = Page(path.read_text()).text
    assert text.index("What is wrong") > text.rindex(words.verdict_sentence(one))
    order = ["What is wrong", one.findings[1].evidence[1:], "What repairs it",
             one.advice[0].line, "By layer", "on its way forward", "on its way back"]  # fmt: skip
    places = [text.index(part, text.index("What is wrong")) for part in order]
    assert places == sorted(places)
    assert "Every 8th of 192 layers" in text


def test_what_cannot_be_drawn_is_said(made):
    data = embedded(made["not finite"][1])
    gaps = data["stacks"][0]["gaps"]
    assert gaps["stream_variance"] == (
        "Not drawn: of the measurement, 8 of 13 values are infinite or undefined, the first at layer 2."
    )
    assert "2 of 13 values are exactly 0, the first at layer 2" in gaps["gradient_variance"]
    assert gaps["parameter_gradient"] == ""
    assert not any(embedded(made["4 layers"][1])["stacks"][0]["gaps"].values())
    page = Page(made["not finite"][1].read_text())
    assert "infinite" in page.text
    assert "undefined" in page.text


def test_each_stack_has_its_own_figures_and_table(made):
    page = Page(made["two stacks"][1].read_text())
    for stack in ("encoder", "decoder"):
        for figure in (
            "plot-{}-stream_variance",
            "plot-{}-gradient_variance",
            "map-{}-measured",
            "glance-{}-predicted",
        ):
            assert figure.format(stack) in page.ids
        assert f"{stack.capitalize()}, 6 layers" in page.text


def test_what_was_not_measured_is_left_out(made):
    alone = made["no measurement"][1]
    assert embedded(alone)["sources"] == ["predicted"]
    assert "map-decoder-measured" not in Page(alone.read_text()).ids
    assert "attention" not in Page(made["no statistics"][1].read_text()).ids
    assert "gradient" not in Page(made["no gradients"][1].read_text()).ids
    assert "advice" not in Page(made["fine"][1].read_text()).ids


def test_a_place_that_only_one_source_knows_keeps_its_row(tmp_path):
    one = report(broken=False)
    part = replace(one.measured, taps=tuple(tap for tap in one.measured if tap.layer != 2))
    rows = columns(replace(one, measured=part))["stacks"][0]
    assert [row["x"] for row in rows["rows"] if row["x"] is not None] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    at = [i for i, row in enumerate(rows["rows"]) if row["layer"] == 2]
    assert all(rows["values"]["stream_variance"]["measured"][i] is None for i in at)
    assert all(rows["values"]["stream_variance"]["predicted"][i] is not None for i in at)


def test_every_kind_of_finding_is_explained_and_every_column_belongs_to_a_group():
    assert set(words.MEANING) == set(KINDS)
    assert set(MARKED) <= set(KINDS)
    assert {quantity.group for quantity in view.QUANTITIES} == {"stream", "gradient", "attention", "parameters"}
    for figures in MARKED.values():
        assert set(figures) <= set(view.BY_KEY)


def test_changes_are_those_of_the_advice(made):
    one, path = made["4 layers"]
    found = {c["key"]: (c["before"], c["after"]) for c in embedded(path)["advice"][1]["changes"]}
    largest = [
        max(tap.forward.variance for tap in t.stream("decoder")) for t in (one.predicted, one.advice[1].predicted)
    ]
    assert found["stream_variance"] == pytest.approx(tuple(largest))
    ratios = [
        t["decoder.0.feed_forward.input"].backward.variance / t["decoder.output"].backward.variance
        for t in (one.predicted, one.advice[1].predicted)
    ]
    assert found["gradient_variance"] == pytest.approx(tuple(ratios))
    shares = [sum(tap.share or 0.0 for tap in t.at("branch")) for t in (one.predicted, one.advice[1].predicted)]
    assert found["branch_share"] == pytest.approx(tuple(shares))


def test_an_advice_that_cures_nothing_else_still_makes_a_page(tmp_path):
    other = replace(report(), findings=(finding("dead_matrix", "harmful", depth=0),))
    text = Page(write_report(other, tmp_path).read_text()).text
    assert "No advice cures it" in text


def test_a_thousand_layers_make_a_page(tmp_path):
    deep = replace(report(broken=False), predicted=trace(1000, growth=1.001), measured=None)
    path = write_report(deep, tmp_path)
    assert len(embedded(path)["stacks"][0]["rows"]) == 2004  # and embedding, output, final norm, logits
    assert Page(path.read_text()).text.count("Every 42nd of 1000 layers") == 1


def test_reports_are_written_without_torch():
    code = "import sys, clearhead.signal.report, clearhead.signal.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_template_is_packaged():
    package = ROOT / "src" / "clearhead"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["clearhead"]
    templates = [path.relative_to(package).as_posix() for path in package.rglob("*.j2")]
    assert len(templates) >= 7
    for name in templates:
        wanted = [pattern for pattern in patterns if pattern.count("/") == name.count("/")]
        assert any(fnmatch.fnmatch(name, pattern) for pattern in wanted), name


@pytest.mark.full
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("case", ["192 layers", "two stacks", "no measurement", "not finite"])
def test_a_browser_draws_every_figure_and_sorts_the_table(made, case, tmp_path):
    """Draws the page, clicks on the first column's heading, and looks at what became of it."""
    _, path = made[case]
    click = """<script>addEventListener("load", () => setTimeout(() => {
      document.querySelector('#table button[data-source="predicted"]').click();
      document.body.dataset.drawn = document.querySelectorAll(".plot .main-svg").length > 0 &&
        [...document.querySelectorAll(".plot")].every((plot) => plot.querySelector(".main-svg"));
      document.body.dataset.first = document.querySelector("#table tbody td").textContent; }, 1500));
      addEventListener("error", (event) => { document.body.dataset.failure = event.message; });</script>"""
    copy = tmp_path / "page.html"
    copy.write_text(path.read_text().replace("<body>", f"<body>{click}", 1))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom"]  # fmt: skip
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"<body([^>]*)>", done)
    assert body
    assert "data-failure" not in body[1]
    assert 'data-drawn="true"' in body[1]
    values = [float(v) for s in embedded(path)["stacks"] for v in s["values"]["stream_variance"]["predicted"] if v]
    first = re.search(r'data-first="([^"]*)"', body[1])
    assert first
    assert float(first[1].replace(",", "")) == pytest.approx(max(values), rel=1e-3)
