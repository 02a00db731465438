"""Every number of a report is measured, predicted, counted or stated, says so, and is none of the others.

The oracle is the result itself: where what is predicted changes in it, the numbers that change are those marked as predicted.
"""
from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from report_reader import NUMBER, Reader, of_markdown
from report_sample import sample, with_bits, with_devices

from edgecomp.report.formats import KINDS
from edgecomp.report.page import render
from edgecomp.report.text import markdown

Change = Callable[[dict[str, Any]], None]


def scale(tree: dict[str, Any], names: set[str], by: float) -> None:
    """Multiplies the numbers of these names, and those in dictionaries of these names."""
    for key, value in tree.items():
        if key in names and isinstance(value, dict):
            scale(value, set(value), by)
        elif key in names and isinstance(value, (int, float)):
            tree[key] = value * by


def measure_more(result: dict[str, Any]) -> None:
    for plan in result["plans"]:
        scale(plan["latency"], {*plan["latency"]} - {"repeats", "prompt_rows"}, 1.31)
        scale(plan["peak"], {"peak_bytes"}, 1.31)
        scale(plan["accuracy"], {"all", "by_task"}, 0.93)
    for gauge in result["machine"].get("gauges", []):
        scale(gauge, {"before", "after"}, 1.31)
    for pair in result.get("compared", []):
        pair["measured"] *= 1.31


def predict_more(result: dict[str, Any]) -> None:
    for plan in predictions(result):
        scale(plan, {*plan} - {"work"}, 1.23)
    for pair in result["compared"]:
        scale(pair, {"predicted"}, 1.23)


def count_more(result: dict[str, Any]) -> None:
    for plan in result["plans"]:
        scale(plan["memory"], {*plan["memory"]}, 1.31)
        scale(plan["counts"], {*plan["counts"]}, 3.0)
        plan["latency"]["prompt_rows"] += 1000
    for by, bundle in enumerate(result["bundles"], 2):
        bundle["weights_bytes"] *= by
    for plan in predictions(result):
        for work in plan["work"].values():
            work["flops"], work["bytes"] = work["flops"] * 1.37, work["bytes"] * 1.11


def state_more(result: dict[str, Any]) -> None:
    for device in result["devices"]:
        scale(device, {"usable_bytes", "peak_flops_per_s", "bandwidth_bytes_per_s"}, 1.19)


def predictions(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (plan for device in result.get("devices", []) for plan in device["plans"].values() if "refused" not in plan)


def changed(result: dict[str, Any], change: Change, before: Reader) -> list[bool]:
    """Of every number of the page, whether it is another one after a change of the result."""
    other = copy.deepcopy(result)
    change(other)
    after = Reader(render(other))
    assert [(kinds, table) for _, kinds, table in before.numbers] == [(kinds, table) for _, kinds, table in after.numbers]
    return [one[0] != two[0] for one, two in zip(before.numbers, after.numbers)]


@pytest.fixture(scope="module", params=[sample, with_bits], ids=["one precision", "several"])
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return with_devices(request.param())


@pytest.fixture(scope="module")
def page(result: dict[str, Any]) -> Reader:
    return Reader(render(result))


def test_every_number_has_one_kind(page: Reader) -> None:
    assert not [found for found in page.numbers if len(found[1]) != 1 or found[1][0] not in KINDS]
    assert set(Counter(kinds[0] for _, kinds, _ in page.numbers)) == set(KINDS) and len(page.numbers) > 1000


def test_a_number_follows_what_it_is_marked_as_and_nothing_else(result: dict[str, Any], page: Reader) -> None:
    changes = measure_more, predict_more, count_more, state_more
    by_measured, by_predicted, by_counted, by_stated = (changed(result, change, page) for change in changes)
    tokens = {str(plan["keep"]) for plan in result["plans"]}  # counted, too; a plan's budget cannot be changed without its name
    for number, measured, predicted, counted, stated in zip(page.numbers, by_measured, by_predicted, by_counted, by_stated):
        text, (kind,), table = number
        if kind == "measured":
            assert measured and not predicted and not counted and not stated, number
        elif kind == "predicted":
            assert predicted and not measured, number  # a rate of operations follows from their count as well
        elif kind == "counted":
            assert (counted or text in tokens) and not measured and not predicted and not stated, number
        elif kind == "stated":
            assert stated and not measured and not predicted and not counted, number
        else:
            assert not counted and not stated and (table == "errors" or (measured and predicted)), number


def test_nothing_is_predicted_without_devices() -> None:
    result = sample()
    page = Reader(render(result))
    by_measured, by_counted = changed(result, measure_more, page), changed(result, count_more, page)
    tokens = {str(plan["keep"]) for plan in result["plans"]}
    for (text, (kind,), _), measured, counted in zip(page.numbers, by_measured, by_counted):
        assert (kind, measured, counted) in (("measured", True, False), ("counted", False, True)) or (kind == "counted" and text in tokens)
    assert "There are no predictions in this report." in render(result)
    assert render({**result, "devices": [], "compared": []}) == render(result)


def test_a_column_has_one_kind_and_says_which(result: dict[str, Any], page: Reader) -> None:
    joint = {"joint", "bundles"} if len(result["bundles"]) > 1 else set()
    assert joint | {"glance", "fits", "device-times", "rooflines", "errors", "compared", "profiles", "accuracy", "tasks", "latency", "gauges",
                    "memory", "counts"} == set(page.tables)
    for table in page.tables.values():
        for at, head in enumerate(table.heads):
            kinds = {row[at][1] for row in table.rows if at < len(row) and NUMBER.search(row[at][0]) and row[at][1]}
            assert len(kinds) <= 1, (table.id, head)
            for kind in kinds:
                said = head.endswith(f" {kind}") or table.caption.endswith(f"All {kind}.")
                assert said or (kind == "error" and table.caption.startswith("Errors of the predictions")), (table.id, head)
    beside = [{row[at][1] for row in page.tables["compared"].rows} for at in range(1, 4)]
    assert beside == [{"predicted"}, {"measured"}, {"error"}]


def test_a_mark_says_of_each_of_its_numbers_what_it_is(page: Reader) -> None:
    marks = [element.attributes["aria-label"] for element in page.elements if "mark" in element.classes]
    assert len(marks) > 50
    for mark in marks:
        for line in mark.splitlines()[1:]:
            if NUMBER.search(line) and not line.startswith(("pivots:", "seed:")):
                assert len(re.findall(r"\((?:measured(?: here)?|predicted|counted)\)", line)) == 1, line
    assert any("(measured here)" in mark and "(predicted)" in mark for mark in marks)


def test_markdown_has_the_numbers_of_the_page(result: dict[str, Any], page: Reader) -> None:
    found = of_markdown(markdown(result))
    for kind in KINDS:
        shown = Counter(text for text, kinds, table in page.numbers if kinds == [kind] and table)
        assert Counter(found[kind]) == shown, kind
    assert "predicted" not in of_markdown(markdown(sample()))
