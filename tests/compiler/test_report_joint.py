"""Bits and tokens in one report: every plan in every precision, held against baselines of its own bits and the first bundle's full model."""
from __future__ import annotations

import copy
import re
from statistics import fmean
from typing import Any

import pytest
from report_reader import Reader
from report_sample import BITS, QUESTIONS, RIGHT, sample, with_bits, with_devices

from edgecomp.report.contents import Contents
from edgecomp.report.formats import DASH
from edgecomp.report.marks import SLACK, group, looks, losers
from edgecomp.report.page import render
from edgecomp.report.text import markdown
from edgecomp.report.tradeoff import SIZES, chart

Measures = dict[tuple[str, str], dict[str, float]]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return with_bits()


@pytest.fixture(scope="module")
def measures(result: dict[str, Any]) -> Measures:
    """(plan, bits) -> what was measured; of seeds the mean."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for plan in result["plans"]:
        found.setdefault((re.sub("-seed[12]", "", plan["name"]).rpartition(" in ")[0], plan["bits"]), []).append(plan)
    return {key: {"percent right": fmean(p["accuracy"]["all"] for p in those),
                  "first token": fmean(p["latency"]["first_token_ms"]["median"] for p in those),
                  "prefill": fmean(p["latency"]["prefill_ms"]["median"] for p in those),
                  "each further token": fmean(p["latency"]["per_token_ms"]["median"] for p in those),
                  "peak memory": fmean(p["peak"]["peak_bytes"] for p in those) / 2**20} for key, those in found.items()}


def test_one_table_has_every_plan_in_every_precision(result: dict[str, Any], measures: Measures) -> None:
    table = Reader(render(result)).tables["joint"]
    assert table.heads[1:] == list(BITS) and table.caption.endswith("All measured.")
    assert set(table.groups) == {"percent right", "first token", "prefill", "each further token", "peak memory"}
    assert {row[0][0].partition(" ")[2] for row in table.rows} == {"", " 3 seeds", " nearest to 127"}
    shown = {(row[0][0].split()[0], bits, of): cell[0] for of, row in zip(table.groups, table.rows) for bits, cell in zip(BITS, row[1:])}
    assert len(shown) == 5 * len(measures) == 5 * 3 * (1 + 4 * len(RIGHT))
    for (plan, bits), values in measures.items():
        for of, value in values.items():
            assert float(shown[plan, bits, of].split()[0]) == pytest.approx(value, rel=6e-3, abs=0.05), (plan, bits, of)
    rates = [100 * right / QUESTIONS for right in RIGHT[64]["random"]]
    assert shown["random-64", "fp32", "percent right"].endswith(f" {min(rates):.1f}{DASH}{max(rates):.1f}")


def test_what_a_bundle_has_not_is_a_dash(result: dict[str, Any]) -> None:
    few = {**result, "plans": [plan for plan in result["plans"] if plan["name"] != "dart-64 in int8"]}
    rows = [row for row in Reader(render(few)).tables["joint"].rows if row[0][0] == "dart-64"]
    assert len(rows) == 5 and all(row[2][0] == DASH and row[1][0] != DASH != row[3][0] for row in rows)


def test_the_weights_of_each(result: dict[str, Any]) -> None:
    rows = [[cell[0] for cell in row] for row in Reader(render(result)).tables["bundles"].rows]
    assert rows == [["fp32", "62.2 MiB", DASH, "scenes-fp32"], ["int8", "26.2 MiB", "0.422", "scenes-int8"],
                    ["int4", "19.0 MiB", "0.305", "scenes-int4"]]


def test_the_verdict_is_the_soonest_first_token_near_the_first_bundle_s_full_model(result: dict[str, Any], measures: Measures) -> None:
    whole = measures["full", "fp32"]
    near = {key: of for key, of in measures.items() if of["percent right"] >= whole["percent right"] - SLACK and key != ("full", "fp32")}
    swiftest = min(of["first token"] for of in near.values())
    swift = [(key, of) for key, of in near.items() if of["first token"] <= 1.05 * swiftest]
    (plan, bits), pick = max(swift, key=lambda each: each[1]["percent right"])
    least = min(near, key=lambda key: near[key]["peak memory"])
    assert bits == "int4" != least[1] and min(int(name.partition("-")[2]) for name, _ in near if name != "full") < int(plan.partition("-")[2])
    said = Contents.of(result).verdict_text
    assert pick["first token"] > swiftest and "none give their first token more than 5 % sooner. " in said and "It is a baseline" not in said
    assert f"visual tokens and **{bits}**, **{plan} in {bits}** answers **{pick['percent right']:.1f} %** right, " in said
    assert f"its first token in {pick['first token']:.0f} ms instead of {whole['first token']:.0f} ms" in said
    assert f"**{' in '.join(least)}** takes the least memory of them: a peak of **{near[least]['peak memory']:.0f} MiB**" in said
    assert said.replace("**", "") in markdown(result).replace("**", "")
    bold = [line.split(" | ")[1] for line in markdown(result).splitlines() if line.startswith(("| percent right", "| peak memory")) and "**" in line]
    assert bold == [plan, plan]
    other = copy.deepcopy(result)
    other["plans"][0]["latency"]["first_token_ms"]["median"] = 1.0
    said = Contents.of(other).verdict_text
    assert other["plans"][0]["name"] == "full in fp32" and "slower" in said and "5 % sooner" not in said
    assert "No other bits and tokens within 2 points of full in fp32 give theirs sooner than that." in said


def test_a_plan_loses_to_baselines_in_its_own_bits_only(result: dict[str, Any]) -> None:
    """In each precision as many answers are lost by every plan, so that each loses to what it loses to in fp32, and to nothing else."""
    alone, together = losers(sample()["plans"]), losers(result["plans"])
    assert {name: set(lost) for name, lost in together.items()} == {f"{name} in {bits}": set(lost) for bits in BITS for name, lost in alone.items()}
    assert any(alone.values())
    few = {**result, "plans": [plan for plan in result["plans"] if plan["name"] != "pool-64 in int8"]}
    assert Contents.of(few).missing[64] == ["pool"] and not Contents.of(few).missing[36] and not any(Contents.of(result).missing.values())
    assert "pool" not in losers(few["plans"])["dart-64 in int8"] and "pool" in losers(few["plans"])["dart-64 in int4"]


@pytest.mark.parametrize("size", SIZES)
def test_in_the_chart_a_colour_is_a_precision_and_a_shape_a_method(result: dict[str, Any], size: str) -> None:
    marks = group(result["plans"])
    drawn = chart(marks, "first_token_ms", *SIZES[size])
    assert drawn is not None and len(drawn["marks"]) == len(marks) == 3 * (1 + 4 * len(RIGHT))
    colours, shapes = ({key: {entry["look"][at] for entry in drawn["marks"] if getattr(entry["mark"], of) == key}
                        for key in {getattr(mark, of) for mark in marks}} for at, of in ((0, "bits"), (1, "variant")))
    for looked, count in ((colours, 3), (shapes, 5)):
        assert len(looked) == count == len(set().union(*looked.values())) and all(len(each) == 1 for each in looked.values())
    assert {len(places) for line, places in drawn["lines"].items() if not line.startswith("full")} == {len(RIGHT)}
    page = Reader(render(result))
    assert {"k0", "k1", "k2"} <= {css for element in page.elements if "bits" in element.classes for css in element.classes}


def test_one_bundle_is_as_without(result: dict[str, Any]) -> None:
    """Bits are not said where all plans have the same."""
    alone = sample()
    assert "in fp32" not in render(alone) and "joint" not in Contents.of(alone).tables
    named = copy.deepcopy(alone)
    for plan in named["plans"]:
        plan["bits"] = "fp32"
    assert render(named) == render(alone) and markdown(named) == markdown(alone)
    assert set(looks(group(alone["plans"]))) == {"full", "random", "dart", "cls", "pool"}


def test_a_device_s_roofs_are_of_one_precision(result: dict[str, Any]) -> None:
    found = Contents.of(with_devices(with_bits()))
    assert [mark.bits for mark in found.focus] == ["fp32", "int4"] and [mark.bits for mark in found.roofed] == ["fp32"]
    assert {mark.bits for mark in found.few} == set(BITS) and len(found.few) == 3 * (1 + len(RIGHT))
