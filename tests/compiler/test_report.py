"""The report page: it loads nothing, shows every number, warns of exactly the plans that lose, and survives what is missing or hostile."""
from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import QUESTIONS, RIGHT, TOKENS, make_plan, sample

from edgecomp.report.axes import ticks
from edgecomp.report.formats import DASH, ms, number, size
from edgecomp.report.marks import group, losers, pareto
from edgecomp.report.page import render
from edgecomp.report.tradeoff import chart


class Page(HTMLParser):
    """Every tag with its attributes, text by table cell, list items by data-plan, and shapes by figure."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.warned: dict[str, str] = {}
        self.rects: dict[str, int] = {}
        self.text: list[str] = []
        self.cell = False
        self.item: str | None = None
        self.figure: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.cell = self.cell if tag in ("small", "svg", "use") else tag in ("td", "th")
        if tag == "li":
            self.item = found.get("data-plan")
        if tag == "figure":
            self.figure = found["data-plan"]
            self.rects[str(self.figure)] = 0
        if tag == "rect" and self.figure:
            self.rects[self.figure] += 1

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")
        self.item = None if tag == "li" else self.item
        self.figure = None if tag == "figure" else self.figure

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data
        if self.item:
            self.warned[self.item] = self.warned.get(self.item, "") + data

    def row(self, start: str, table: int = 0) -> list[str]:
        """The cells of the table row that begins with a text; spaces made single."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return [row for row in rows if row and row[0].startswith(start)][table]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="module")
def html(result: dict[str, Any]) -> str:
    return render(result)


def test_loads_nothing(html: str) -> None:
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert "@import" not in html and "http://" not in html and "https://" not in html
    assert html.count("data:image/jpeg") == 1


def test_every_plan_and_accuracy_is_in_a_table(html: str, result: dict[str, Any]) -> None:
    page = Page(html)
    for plan in result["plans"]:
        assert [plan["name"], str(plan["keep"]), f"{plan['accuracy']['all']:.1f}"] in [row[:3] for row in page.rows]
    for budget, row in zip(RIGHT, zip(*(page.row(name)[1:-1] for name in ("dart", "cls", "random", "pool")))):
        for cell, method in zip(row, ("dart", "cls", "random", "pool")):
            rights = RIGHT[budget][method]
            rights = rights if isinstance(rights, tuple) else (rights,)
            assert cell.startswith(f"{100 * sum(rights) / len(rights) / QUESTIONS:.1f}")
            assert method != "random" or f"{100 * min(rights) / QUESTIONS:.1f}{DASH}{100 * max(rights) / QUESTIONS:.1f}" in cell
    assert page.row("pool")[3].endswith("at 126") and "pool cannot make 127, this is the nearest it can" in "".join(page.text)


def test_warns_of_exactly_the_losers(html: str, result: dict[str, Any]) -> None:
    expected = {}
    for budget, rates in RIGHT.items():
        for method in ("dart", "cls", "pool"):
            worse = [b for b, loses in (("random", 3 * rates[method] < sum(rates["random"])), ("pool", rates[method] < rates["pool"])) if loses]
            made = 126 if (method, budget) == ("pool", 127) else budget
            expected[f"{method}-{made}"] = worse
    found = losers(result["plans"])
    assert {name: list(worse) for name, worse in found.items() if worse} == {name: worse for name, worse in expected.items() if worse}
    assert set(found) == {plan["name"] for plan in result["plans"]}
    page = Page(html)
    assert set(page.warned) == {name for name, worse in expected.items() if worse}
    for name, text in page.warned.items():
        assert [b for b in ("random", "pool") if f" {b} (" in " ".join(text.split())] == expected[name]
    marked = {f"{row[0].split()[0]}-{126 if (row[0].split()[0], budget) == ('pool', 127) else budget}": cell
              for row in (page.row(m) for m in ("dart", "cls", "pool")) for budget, cell in zip(RIGHT, row[1:])}
    assert {name for name, cell in marked.items() if "▼" in cell} == set(page.warned)


@given(rights=st.lists(st.integers(0, QUESTIONS), min_size=5, max_size=5))
def test_losing_is_by_whole_answers_and_ties_are_no_loss(rights: list[int]) -> None:
    method, pool, *seeds = rights
    plans = [make_plan("dart-64", "dart", 64, method, {}), make_plan("pool-64", "pool", 64, pool, {})]
    plans += [make_plan(f"random-64-{i}", "random", 64, seed, {"seed": i}) for i, seed in enumerate(seeds)]
    found = losers(plans)
    assert ("random" in found["dart-64"], "pool" in found["dart-64"]) == (3 * method < sum(seeds), method < pool)
    assert ("random" in found["pool-64"]) == (3 * pool < sum(seeds))
    assert not any(found[f"random-64-{i}"] for i in range(3))


def test_no_losers_no_warning(result: dict[str, Any]) -> None:
    calm = copy.deepcopy(result)
    calm["plans"] = [plan for plan in calm["plans"] if not losers(result["plans"])[plan["name"]]]
    page = Page(render(calm))
    assert not page.warned and "No plan loses" in "".join(page.text)


def test_says_where_a_baseline_is_missing(result: dict[str, Any]) -> None:
    lone = copy.deepcopy(result)
    lone["plans"] = [plan for plan in lone["plans"] if plan["name"] != "pool-64"]
    assert "Not compared at 64 tokens: pool has no accuracy there" in render(lone)
    assert list(losers(lone["plans"])["dart-64"]) == ["random"]


def test_hostile_strings_are_escaped(result: dict[str, Any]) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    bad = copy.deepcopy(result)
    bad["bundles"][0]["name"] = bad["bundles"][0]["source"] = bad["machine"]["cpu"] = bad["command"] = evil
    bad["example"]["answer"] = bad["example"]["question"] = bad["example"]["plans"]["dart-64"]["said"] = evil
    bad["plans"][1].update(name=evil, summary=evil, site=evil, parameters={evil: evil})
    bad["plans"][1]["accuracy"]["by_task"][evil] = 1.0
    bad["example"]["plans"][evil] = bad["example"]["plans"]["cls-64"]
    page = Page(render(bad))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag == "img" or name.startswith("on") for tag, attributes in page.tags for name in attributes)
    assert evil in "".join(page.text)


def test_a_picture_that_is_elsewhere_is_left_out(result: dict[str, Any]) -> None:
    away = copy.deepcopy(result)
    away["example"]["image"] = "https://example.org/x.png"
    assert "example.org" not in render(away)


def test_nulls_render(result: dict[str, Any]) -> None:
    small = {**result, "plans": [plan for plan in result["plans"] if plan["keep"] in (64, 126, TOKENS)], "example": None}

    def without(part: str, *names: str) -> Page:
        bare = copy.deepcopy(small)
        for plan in bare["plans"]:
            if not names or plan["name"] in names:
                plan[part] = None
        return Page(render(bare))
    for part in ("latency", "accuracy", "memory", "counts", "parameters", "site", "position", "summary", "paper", "kind"):
        for names in ([], ["full"], ["dart-64", "random-64", "pool-126"]):
            page = without(part, *names)
            said = [*page.text, *(value or "" for _, attributes in page.tags for name, value in attributes.items() if name == "aria-label")]
            assert not re.search(r"\b(None|nan|inf|Undefined)\b", " ".join(said)), (part, names)
    assert without("latency", "dart-64").row("dart-64", 1)[1:] == [DASH] * 7
    assert without("accuracy", "dart-64").row("dart")[1].startswith(DASH)
    assert "No accuracy was measured" in "".join(without("accuracy").text)
    bare = copy.deepcopy(small)
    bare["machine"]["threads"] = bare["plans"][1]["latency"]["vision_ms"] = bare["plans"][2]["memory"]["peak_bytes"] = None
    assert "One picture" not in render(bare)
    for plans in ([bare["plans"][0]], bare["plans"][1:], bare["plans"][1:2], []):
        assert render({**bare, "plans": plans})


def test_draws_one_rectangle_a_kept_token(html: str, result: dict[str, Any]) -> None:
    keeps = {plan["name"]: plan["keep"] for plan in result["plans"]}
    drawn = Page(html).rects
    assert drawn == {name: keeps[name] for name in result["example"]["plans"]}
    assert {"dart-64", "pool-64", "pool-126", "random-64-seed2", "full"} <= set(drawn)


def test_says_what_is_right(html: str) -> None:
    captions = re.findall(r"<figcaption><b>([^<]*)</b>.*?(✓|✗)", html)
    assert dict(captions)["cls-64"] == "✓" and dict(captions)["dart-64"] == "✗"


def test_judges_no_answer_where_the_right_one_is_unknown(result: dict[str, Any]) -> None:
    asked = copy.deepcopy(result)
    asked["example"]["answer"] = ""
    page = render(asked)
    assert "✗ wrong" not in page and "✓ right" not in page and "The answer is" not in page


def test_counts_tokens_beside_the_grid(html: str, result: dict[str, Any]) -> None:
    assert f"{TOKENS} visual tokens: a grid of 24 \u00d7 24<" in html
    tiled = copy.deepcopy(result)
    tiled["bundles"][0]["tokens"] = TOKENS + 64
    assert f"{TOKENS + 64} visual tokens: a grid of 24 \u00d7 24, and 64 beside it (overview and separators)" in render(tiled)


def test_verdict(html: str, result: dict[str, Any]) -> None:
    def sentence(plans: list[dict[str, Any]]) -> str:
        found = re.search(r'<p class="verdict">(.*?)</p>', render({**result, "plans": plans}), re.S)
        assert found
        return " ".join(re.sub(r"<[^>]*>", "", found[1]).split())
    whole = sentence(result["plans"])  # 81 of 113 is 1.8 points below 83
    assert whole.startswith("With 127 of 576 visual tokens, cls-127 answers 71.7 % right, 1.8 points below the full model")
    slow, fast = (next(p for p in result["plans"] if p["name"] == name)["latency"]["first_token_ms"]["median"] for name in ("full", "cls-127"))
    assert f"{slow / fast:.1f}\N{MULTIPLICATION SIGN} as fast" in whole
    few = [plan for plan in result["plans"] if plan["keep"] in (36, TOKENS)]
    assert sentence(few).startswith("No plan stays within 2 points of the full model (73.5 %). The nearest is cls-36 with 54.0 %, 19.5 points below")
    base = [plan for plan in result["plans"] if plan["method"] in ("none", "random", "pool")]
    assert "It is a baseline" in sentence(base)


places = st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float))


@given(st.lists(places, max_size=12))
def test_pareto_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(i: int) -> bool:
        return any(x <= points[i][0] and y >= points[i][1] and (x, y) != points[i] for x, y in points)
    assert sorted(pareto(points)) == [i for i in range(len(points)) if not beaten(i)]
    assert [points[i] for i in pareto(points)] == sorted(points[i] for i in pareto(points))


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.integers(3, 8))
def test_ticks_cover_and_are_few(one: float, other: float, about: int) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high, about)
    room = 1e-6 * max(high, 1)
    assert found[0] <= low + room and found[-1] >= high - room
    assert 2 <= len(found) <= about + 3 and len(set(found)) == len(found)


@pytest.mark.parametrize("sides", [(880, 430), (400, 380)])
def test_chart_stays_inside_and_labels_do_not_overlap(result: dict[str, Any], sides: tuple[int, int]) -> None:
    drawn = chart(group(result["plans"]), "first_token_ms", *sides)
    assert drawn is not None and len(drawn["marks"]) == 1 + 4 * len(RIGHT)
    for mark in drawn["marks"]:
        assert drawn["left"] <= mark["times"][0] <= mark["x"] <= mark["times"][1] <= drawn["right"]
        assert drawn["top"] <= mark["rates"][0] <= mark["y"] <= mark["rates"][1] <= drawn["bottom"]
    boxes = [(x, y - 9, x + 7 * len(str(m["mark"].keep)), y) for m in drawn["marks"] if m["label"] for x, y in [m["label"]]]
    assert len(boxes) > len(RIGHT)
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for i, a in enumerate(boxes) for b in boxes[:i])


def test_random_is_one_mark_of_three_seeds(result: dict[str, Any]) -> None:
    marks = group(result["plans"])
    assert [len(mark.plans) for mark in marks if mark.method == "random"] == [3] * len(RIGHT)
    assert next(mark for mark in marks if mark.method == "random").name == "random-36"


def test_other_settings_are_other_lines(result: dict[str, Any]) -> None:
    plans = [make_plan("dart-64", "dart", 64, 60, {"pivots": 8}), make_plan("dart-64-p2", "dart", 64, 61, {"pivots": 2})]
    assert [mark.line for mark in group(plans)] == ["dart (pivots 8, projector, keep)", "dart (pivots 2, projector, keep)"]
    assert render({**result, "plans": [result["plans"][0], *plans]})


def test_numbers_are_for_people() -> None:
    assert [number(v) for v in (None, 0, 0.4213, 8.426, 84.26, 842.6, 8426)] == [DASH, "0", "0.421", "8.43", "84.3", "843", "8426"]
    assert [ms(v) for v in (None, 5.127, 641.7, 12_345)] == [DASH, "5.13 ms", "642 ms", "12.3 s"]
    assert [size(v) for v in (None, 500, 921_600, 20 * 2**20, 3 * 2**30)] == [DASH, "500 bytes", "900 KiB", "20.0 MiB", "3.00 GiB"]
