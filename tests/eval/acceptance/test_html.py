"""The page: well-formed, self-contained, accessible, complete; strings of users are text and nothing else."""

from __future__ import annotations

import base64
import re
from collections import Counter
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from specdec.eval.acceptance import html
from specdec.eval.acceptance.charts import build_charts
from specdec.eval.acceptance.html import COLUMNS, render_html, write_html
from specdec.eval.acceptance.summary import sections
from support.acceptance_document import check, document, estimate, without_values

VOID = {"meta", "link", "br", "img", "hr", "input"}
ATTACK = "\"><script>alert('x')</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"
SMALL = document((0.0, 0.6), ("block",), (1, 2), (1,), ("code", "text"))
NO_BREAK = "\N{NO-BREAK SPACE}"


class Page(HTMLParser):
    """Tags in order with their attributes, the text by enclosing tag; raises where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside: list[tuple[str, ...]] = []  # of each tag, those around it
        self.texts: list[tuple[str, str]] = []  # innermost tag, text
        self.rows: list[list[str]] = []  # of all tables
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice: {names}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside.append(tuple(self.open))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag, line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += f" {data.strip()}"

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(re.sub(r"\s+", " ", text) for tag, text in self.texts if tag != "style")

    def row(self, *start: str) -> list[str]:
        (found,) = [r for r in ([c.strip() for c in row] for row in self.rows) if r[: len(start)] == list(start)]
        return found


def huge_names() -> dict[str, Any]:
    return document((0.6,), ("block",), (1,), (1,), ("word " * 400, "x" * 2000, ATTACK))


DOCUMENTS = {
    "default": document(),
    "small": SMALL,
    "one cell": SMALL | {"cells": SMALL["cells"][2:3], "experts": None},
    "only plain": SMALL | {"cells": SMALL["cells"][:1], "experts": None},
    "no cells": SMALL | {"cells": [], "experts": None},
    "no values": without_values(document()),
    "no categories": document((0.6,), ("block",), (1,), (1,), ()),
    "many cells": document((0.0, 0.3, 0.6, 1.0), ("coupled", "block", "token"), (1, 3, 8), (1,)),
    "huge names": huge_names(),
}


@pytest.fixture(scope="module", params=DOCUMENTS)
def rendered(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    return DOCUMENTS[request.param], render_html(DOCUMENTS[request.param])


@pytest.fixture(autouse=True)
def _blank_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; `rendered`, of a wider scope, is made before."""
    monkeypatch.setattr(html, "draw", lambda *_: b"<svg></svg>")


@pytest.mark.slow
def test_the_page_is_well_formed(rendered: tuple[dict[str, Any], str]) -> None:
    _, source = rendered
    page = Page(source)
    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == len(page.all("main")) == 1
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels)), "a level of headings is skipped"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


@pytest.mark.slow
def test_nothing_comes_from_elsewhere_and_nothing_runs(rendered: tuple[dict[str, Any], str]) -> None:
    _, source = rendered
    page = Page(source)
    assert not {"script", "iframe", "object", "embed", "base", "form", "svg"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "style", "background")]
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:"), attributes[name][:80]
    style = " ".join(text for tag, text in page.texts if tag == "style")
    assert not re.search(r"url\(|@import|expression", style)
    assert "http:" not in source
    assert "https:" not in source
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.slow
def test_pictures_and_tables_speak(rendered: tuple[dict[str, Any], str]) -> None:
    made, source = rendered
    page = Page(source)
    charts = build_charts(made)
    assert [i["alt"] for i in page.all("img")] == [c.alt for c in charts.charts]
    for picture in page.all("img"):
        kind, data = picture["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert len(base64.b64decode(data, validate=True).split(b"</svg>")[0]) > 10_000
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert {th.get("scope") for th in page.all("th")} <= {"col", "row", "rowgroup"}
    around = [inside for (tag, _), inside in zip(page.tags, page.inside, strict=True) if tag == "table"]
    assert all("div" in inside or "section" in inside for inside in around)
    for region in (a for _, a in page.tags if a.get("class", "").startswith("scroll")):
        assert (region["role"], region["tabindex"]) == ("region", "0")
        assert region["aria-label"]
    for missing in charts.missing:
        assert f"Left out: {missing}" in page.text


@pytest.mark.slow
def test_every_section_has_its_verdict_and_its_values(rendered: tuple[dict[str, Any], str]) -> None:
    made, source = rendered
    page = Page(source)
    for section in sections(made):
        assert f"T{section.name[1:]} : {section.verdict}" in page.text
        for cell in section.cells:
            for metric, form, factor in (
                ("speedup", ".2f", 1), ("mean_acceptance_length", ".2f", 1), ("draft_efficiency", ".3f", 1),
                ("block_efficiency", ".2f", 1), ("tokens_per_s_per_request", ",.0f", 1), ("tokens_per_s", ",.0f", 1),
                ("ttft_s", ".1f", 1000),
            ):  # fmt: skip
                e = cell["all"][metric]
                if e["value"] is not None:
                    low, value, high = (format(e[name] * factor, form) for name in ("low", "value", "high"))
                    assert f"{value} {low} to {high}" in page.text, metric
    assert page.text.count(" best K ") >= sum(s.best is not None for s in sections(made))
    assert len([a for tag, a in page.tags if a.get("class") == "best"]) == sum(
        s.best is not None for s in sections(made)
    )


def test_values_stand_in_their_row_and_column() -> None:
    made = document((0.6,), ("block",), (1, 2), (1,), ("code",))
    best = made["cells"][2]
    for i, column in enumerate(COLUMNS):
        place = best["by_expected_acceptance"] if column.metric == "ece" else best["all"]
        place[column.metric] = estimate((10.0 + i) / column.factor, 1 / column.factor)
        best["categories"]["code"][column.metric] = estimate((20.0 + i) / column.factor, 1 / column.factor)
    best["categories"]["code"]["num_requests"] = 17
    page = Page(render_html(made))
    expected = [f"{v:{c.form}} {v - 1:{c.form}} to {v + 1.5:{c.form}}" for c, v in zip(COLUMNS, range(10, 19))]
    assert page.row(f"block, K{NO_BREAK}={NO_BREAK}2 best K")[1:] == [*expected, "96"]
    header = [h.strip() for h in next(row for row in page.rows if row[0].strip() == "setting")]
    assert header == ["setting", *(c.heading for c in COLUMNS), "requests"]
    assert next(r for r in page.rows if r[0].strip() == "code" and len(r) > 2)[-1].strip() == "17"
    categories = [c.strip() for c in next(r for r in page.rows if r[0].strip() == "code" and len(r) > 2)]
    assert categories[1].startswith("20.00 19.00 to 21.50")
    assert "26.0 25.0 to 27.5" in categories


def test_acceptance_by_draft_position_is_tabulated() -> None:
    made = document((0.6,), ("block",), (1, 3), (1,))
    one = made["cells"][2]
    one["all"]["conditional"][2], one["all"]["unconditional"][1] = estimate(0.1234), estimate(0.2345)
    one["alpha"][0] = estimate(0.3456)
    page, name = Page(render_html(made)), f"block, K{NO_BREAK}={NO_BREAK}3"
    assert page.row(name, "conditional")[4] == "0.123 0.103 to 0.153"
    assert page.row(name, "unconditional")[3].startswith("0.234 ")
    assert page.row(name, "overlap")[2].startswith("0.346 ")
    assert page.row(f"block, K{NO_BREAK}={NO_BREAK}1", "conditional")[3:] == ["", ""]


def test_a_failed_check_comes_first() -> None:
    made = deepcopy(SMALL)
    made["cells"][-1]["check"] = check(2, passed=False)
    source = render_html(made)
    page = Page(source)
    message = made["cells"][-1]["check"]["message"]
    assert "1 of 4 checks against the model's own distributions FAILED." in page.text
    assert f"temperature 0.6, batch size 1, block verification, K = 2: {message}" in page.text
    assert source.index("FAILED") < source.index('class="verdicts"')
    assert source.index('role="alert"') < source.index(message.split(":")[0])
    results = [row[1].strip() for row in page.rows if len(row) == 9 and row[1].strip() in ("passed", "FAILED")]
    assert results == ["passed"] * 3 + ["FAILED"]
    assert "-17.50" in page.text
    assert any("open" in attributes for tag, attributes in page.tags if tag == "details")


def test_checks_that_passed_do_not_alarm() -> None:
    page = Page(render_html(SMALL))
    assert "FAILED" not in page.text
    assert not [a for _, a in page.tags if a.get("role") == "alert"]
    assert not any("open" in attributes for tag, attributes in page.tags if tag == "details")
    row = page.row("temperature 0.6, batch size 1, block verification, K = 2")
    assert row[1:] == ["passed", "1000", "0", "1", "1000", "0.7100", "0.7000", "1.25"]


def test_loops_are_warned_of_above_the_verdicts() -> None:
    assert not [a for _, a in Page(render_html(SMALL)).tags if a.get("class") == "warned"]
    made = deepcopy(SMALL)
    for number, share in ((4, 0.84), (5, 0.9)):
        made["cells"][number]["all"]["final_loop_share"] = estimate(share)
        made["cells"][number]["warnings"] = ["loops"]
    source = render_html(made)
    page, place = Page(source), "Temperature 0.6, batch size 1"
    warning = "in 2 of 3 cells 84% to 90% of the output tokens lie in final loops"
    assert f"Warning: outputs that repeat themselves. {place} : {warning}" in page.text
    assert source.index('class="warned"') < source.index('class="verdicts"')
    assert any("84 82 to 87" in [text.strip() for text in row] for row in page.rows)


def test_a_check_without_positions_or_z_is_shown() -> None:
    made = deepcopy(SMALL)
    made["cells"][-1]["check"] |= {"positions": [], "passed": True, "message": "nothing was reached"}
    made["cells"][-2]["check"]["positions"][0] |= {"z": None}
    page = Page(render_html(made))
    assert page.row("temperature 0.6, batch size 1, block verification, K = 2")[4:] == ["nothing was reached"]
    assert page.row("temperature 0.6, batch size 1, block verification, K = 1")[-1] == "\N{EN DASH}"


def test_strings_of_users_are_text() -> None:
    made = document((0.6,), ("block",), (1,), (1,), (ATTACK, "plain & simple"))
    made["provenance"]["command"] = made["provenance"]["checkpoint"]["folder"] = made["prompts"]["name"] = ATTACK
    made["options"] |= {ATTACK: [ATTACK]}
    made["cells"][1]["verification"] = ATTACK
    made["cells"][1]["check"] = check(1, passed=False) | {"message": ATTACK}
    made["experts"]["layers"][0]["layer"] = ATTACK
    source = render_html(made)
    page = Page(source)
    assert not {"script"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if "onerror" in a or a.get("src") == "x"]
    assert "<script" not in source
    assert "&amp;amp;{{ 7 * 7 }}" in source, "escaped once"
    assert page.text.count(ATTACK) >= 8
    (category,) = [r for r in page.rows if len(r) == 2 and r[0].strip() == "plain & simple"]
    assert category[1].strip() == "32"


def test_provenance_and_options_are_complete() -> None:
    page = Page(render_html(SMALL | {"provenance": SMALL["provenance"] | {"git_revision": None}}))
    for name, value in SMALL["provenance"].items():
        if isinstance(value, str) and name != "git_revision":
            assert page.row(name)[1] == value
    assert page.row("git_revision")[1] == "unknown"
    assert page.row("checkpoint sha256")[1] == SMALL["provenance"]["checkpoint"]["sha256"]
    assert page.row("temperatures")[1] == "[0.0, 0.6]"
    assert page.row("max_tokens")[1] == "256"


def test_every_metric_is_defined() -> None:
    page = Page(render_html(SMALL))
    terms = {text.lower() for tag, text in page.texts if tag == "dt"}
    for column in COLUMNS:
        assert column.heading.split(",")[0].lower() in terms
    assert {"in final loops", "expected acceptance of a draft"} <= terms
    for term in ("conditional acceptance of draft i", "unconditional acceptance of draft i", "overlap of draft i"):
        assert term in terms
    assert "the bonus or recovered token included" in page.text


def test_skipped_prompts_are_said() -> None:
    assert "skipped" not in Page(render_html(SMALL)).text
    skipped = SMALL | {"prompts": SMALL["prompts"] | {"num_skipped": 3}}
    assert "3 prompts were skipped." in Page(render_html(skipped)).text


def test_values_of_a_chart_are_beside_it() -> None:
    made = document((0.6,), ("block",), (1, 2), (1,))
    e = made["cells"][2]["all"]["speedup"]
    row = Page(render_html(made)).row("temperature 0.6", "block", "K = 2")
    assert row[3] == f"{e['value']:.3f} {e['low']:.3f} to {e['high']:.3f}"


def test_measured_experts_stand_beside_the_law() -> None:
    page = Page(render_html(SMALL))
    assert [r[0].strip() for r in page.rows if len(r) == 3 and r[0].strip().isdigit()] == list("123456789")
    point = SMALL["experts"]["mean"][1]
    value, low, high = (f"{point['measured'][name]:.2f}" for name in ("value", "low", "high"))
    assert page.row("2", f"{value} {low} to {high}")[2] == f"{point['expected']:.2f}" == "3.75"


def test_the_page_is_styled_for_phones_print_and_dark(tmp_path: Path) -> None:
    source = write_html(SMALL, tmp_path / "new").read_text(encoding="utf-8")
    style = " ".join(text for tag, text in Page(source).texts if tag == "style")
    for needed in ("@media print", "@page", "max-width: 30rem", "prefers-color-scheme: dark", "overflow-x: auto"):
        assert needed in style
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    assert Counter(source)["{"] == Counter(source)["}"]


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    made = document((0.6,), ("block",), (1,), (1,), ("half \ud800 pair",))
    assert "half ? pair" in write_html(made, tmp_path).read_text(encoding="utf-8")
