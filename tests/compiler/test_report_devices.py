"""What a report says of devices: values and verdicts, the charts' places, and that anything may be missing or hostile."""
from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_reader import Reader, of_markdown
from report_sample import DEVICES, prediction, with_devices

import edgecomp.report
from edgecomp.report.axes import Axis, log_ticks
from edgecomp.report.compared import by_phase, ratio_chart
from edgecomp.report.contents import Contents
from edgecomp.report.device_chart import device_chart
from edgecomp.report.formats import DASH, MINUS, metric, ms_span, percent, size_span
from edgecomp.report.marks import group, leaders, unbeaten, verdict
from edgecomp.report.page import render
from edgecomp.report.roofline import rooflines
from edgecomp.report.text import markdown


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return with_devices()


@pytest.fixture(scope="module")
def page(result: dict[str, Any]) -> Reader:
    return Reader(render(result))


def number(text: str) -> float:
    """What a cell begins with, in milliseconds or bytes where it has such a unit."""
    found = re.match(r"[^\d+\u2212]*([+\u2212]?[\d.]+) ?(ms|s|GiB|MiB|KiB|%)?", text)
    assert found, text
    return float(found[1].replace(MINUS, "-")) * {"s": 1000, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}.get(found[2], 1)


def test_every_plan_on_every_device_is_in_the_table(result: dict[str, Any], page: Reader) -> None:
    plans = {plan["name"]: plan for plan in result["plans"]}
    table = page.tables["device-times"]
    assert table.heads[1:] == ["accuracy here, % measured", "vision predicted", "prefill predicted", "first token predicted",
                               "each further token predicted", "tokens a second predicted", "memory predicted"]
    names = {device["name"] + (", this machine" if device["here"] else ""): device for device in result["devices"]}
    assert len(table.rows) == 4 * 17 - 1 and set(table.groups) == set(names)  # seeds are one row, and one plan is refused
    for device, row in zip(table.groups, table.rows):
        name = row[0][0].partition(" ")[0]
        found = prediction(plans[name], names[device]["id"])
        for (text, kind), key in zip(row[2:], ("vision_ms", "prefill_ms", "ttft_ms", "tpot_ms", "decode_tokens_per_s", "memory_bytes")):
            low, high = (float(end) for end in re.findall(r"[\d.]+", text)[-2:])
            assert kind == "predicted" and number(text) == pytest.approx(found[key]["value"], rel=6e-3)
            assert high / low == pytest.approx(found[key]["high"] / found[key]["low"], rel=2e-2)


def test_what_fits_is_said_with_the_largest_part_and_the_way_out(result: dict[str, Any], page: Reader) -> None:
    table, shown = page.tables["fits"], [mark.name for mark in leaders(group(result["plans"]), None)]
    assert [head.partition(" ")[0] for head in table.heads[2:]] == shown
    said = {(row[0][0], name): cell[0] for row in table.rows for name, cell in zip(shown, row[2:])}
    plans = {plan["name"]: plan for plan in result["plans"]}
    for device in result["devices"]:
        for name in shown:
            found = prediction(plans.get(name) or plans[f"{name}-seed0"], device["id"])
            text = said[device["name"] + (", this machine" if device["here"] else ""), name]
            sign = {"fits": "✓", "tight": "!", "does not fit": "✗"}[found["verdict"]]
            assert text.startswith(f"{sign} {found['verdict']} ")
            assert number(text) == pytest.approx(found["memory_bytes"]["value"], rel=6e-3)
    assert {text[0] for text in said.values()} == set("✓!✗")
    reasons = Contents.of(result).reasons
    assert reasons[1] == (f"**Jetson Nano**: full, dart-256, cls-256, random-256, pool-256: does not fit. For full 185{DASH}193 MiB are predicted, "
                          "164 MiB are there: runtime 0.118 of 0.185 GiB: a device with more memory.")
    bare = copy.deepcopy(result)
    bare["devices"][3]["plans"]["full"]["way_out"] = "a device with more memory"
    assert "164 MiB are there; the largest part is runtime, 121 MiB: a device with more memory." in Contents.of(bare).reasons[1]
    assert "**GeForce RTX 4090**: pool-64: not predicted: no constants for pooling in fp32." in reasons
    assert all(reason.replace("**", "") in " ".join(markdown(result).replace("**", "").split()) for reason in reasons)


def test_the_verdict_counts_devices(result: dict[str, Any]) -> None:
    assert Contents.of(result).device_text == (
        "**Predicted:** **cls-127** fits 3 of 4 devices and is tight on Jetson Nano. Where it fits, its first token comes in **1.65 ms** on "
        "GeForce RTX 4090 to **247 ms** on AMD EPYC, 2 cores, this machine.")


def test_errors_are_of_the_measurement(result: dict[str, Any], page: Reader) -> None:
    rows = {row[0][0]: [cell[0] for cell in row[1:]] for row in page.tables["errors"].rows}
    for phase, title in (("vision_ms", "vision"), ("prefill_ms", "prefill"), ("per_token_ms", "each further token"), ("peak_bytes", "peak memory")):
        pairs = [(pair["predicted"], pair["measured"]) for pair in result["compared"] if pair["phase"] == phase]
        errors = [100 * (guess["value"] - took) / took for guess, took in pairs]
        assert number(rows[title][0]) == pytest.approx(median(map(abs, errors)), rel=6e-2)
        assert number(rows[title][1]) == pytest.approx(max(errors, key=abs), rel=6e-2)
        assert rows[title][2] == f"{sum(guess['low'] <= took <= guess['high'] for guess, took in pairs)} of {len(pairs)}"
    assert rows["peak memory"][2].startswith("0 of") and not rows["vision"][2].startswith("0 of")
    table = page.tables["compared"]
    assert len(table.rows) == len(result["compared"]) and {row[4][0] for row in table.rows} == {"within", "outside"}
    assert {group for group, row in zip(table.groups, table.rows) if row[4][0] == "outside"} == {"peak memory"}


accuracies = st.tuples(st.integers(1, 40).map(float), st.integers(0, 6).map(float))


@given(st.lists(accuracies, max_size=10), st.sampled_from([0.0, 0.05, 0.5]))
def test_unbeaten_is_what_nothing_beats(places: list[tuple[float, float]], same: float) -> None:
    for (time, right), good in zip(places, unbeaten(places, same)):
        better = [(other, y) for other, y in places if (y > right and other <= time * (1 + same)) or (y == right and other < time)]
        assert good == (better == [])
    if places:  # the most accurate one, at its fastest, always is
        best = min(places, key=lambda place: (-place[1], place[0]))
        assert unbeaten(places, same)[places.index(best)]


@pytest.mark.parametrize("sides", [(880, 460), (360, 400)])
def test_the_chart_of_devices_shows_their_times(result: dict[str, Any], sides: tuple[int, int]) -> None:
    found = Contents.of(result)
    chart = device_chart(found.devices, found.marks, found.few, *sides)
    assert chart is not None
    times = []
    for entry in chart["marks"]:
        guess = prediction(entry["mark"].plans[0], entry["device"].facts["id"])
        assert entry["memory"] == guess["memory_bytes"]["value"] and entry["fits"] == (guess["verdict"] != "does not fit")
        assert chart["left"] < entry["times"][0] < entry["x"] < entry["times"][1] < chart["right"] and chart["top"] <= entry["y"] <= chart["bottom"]
        times.append((math.log(guess["ttft_ms"]["value"]), entry["x"]))
    (a, left), (b, right) = min(times), max(times)
    assert all(x == pytest.approx(left + (time - a) / (b - a) * (right - left), abs=0.2) for time, x in times)  # logarithmic
    areas = {entry["memory"] / entry["scale"]**2 for entry in chart["marks"]}
    assert max(areas) == pytest.approx(min(areas), rel=1e-2)
    for device in found.devices:
        assert {entry["mark"].name for entry in chart["marks"] if entry["device"] is device} >= {mark.name for mark in found.few if device.plan(mark)}


def test_no_accuracy_no_chart_of_devices(result: dict[str, Any]) -> None:
    bare = copy.deepcopy(result)
    for plan in bare["plans"]:
        plan["accuracy"] = None
    html = render(bare)
    assert "Not drawn: no plan has both an accuracy and a predicted time." in html
    assert "dart-36" in Contents.of(bare).device_text and 'id="device-times"' in html


def test_phases_lie_below_their_roof(result: dict[str, Any]) -> None:
    found = Contents.of(result)
    charts = rooflines(found.devices, found.focus)
    assert [chart["device"].facts["id"] for chart in charts] == list(DEVICES)
    assert len({str(chart["across"] + chart["up"]) for chart in charts}) == 1  # one pair of axes for all
    for chart in charts:
        (x0, y0), (x1, y1), right = _roof(chart["roof"])
        peak, bandwidth = DEVICES[chart["device"].facts["id"]][2:4]
        assert {mark["spot"].mark.name for mark in chart["marks"]} == {"full", "cls-127"} and len(chart["marks"]) == 6
        for mark in chart["marks"]:
            spot = mark["spot"]
            guess = prediction(spot.mark.plans[0], chart["device"].facts["id"])
            work = guess["work"][spot.phase]
            rate = 1000 * work["flops"] / guess[{"vision": "vision_ms", "prefill": "prefill_ms", "decode": "tpot_ms"}[spot.phase]]["value"]
            assert spot.rate == pytest.approx(rate) and spot.intensity == pytest.approx(work["flops"] / work["bytes"])
            on_roof = y1 if mark["x"] >= x1 else y0 + (mark["x"] - x0) / (x1 - x0) * (y1 - y0)
            above = math.log10(min(peak, bandwidth * spot.intensity) / rate)
            (high, up), (low, down) = ((float(metric_value(text)), y) for y, text in (chart["up"][-1], chart["up"][0]))
            decade = (down - up) / math.log10(high / low)
            assert mark["y"] - on_roof == pytest.approx(above * decade, abs=0.6)
        assert right == chart["right"]


def metric_value(text: str) -> float:
    digits, _, prefix = text.partition(" ")
    return float(digits) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]


def _roof(path: str) -> tuple[tuple[float, float], tuple[float, float], float]:
    found = re.fullmatch(r"M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)H([\d.]+)", path)
    assert found
    a, b, c, d, e = map(float, found.groups())
    return (a, b), (c, d), e


def test_the_chart_of_errors_has_1_where_the_measurement_is(result: dict[str, Any]) -> None:
    found = Contents.of(result)
    chart = ratio_chart(by_phase(result), found.few, 880)
    assert chart is not None and [strip["title"] for strip in chart["strips"]] == ["vision", "prefill", "each further token", "peak memory"]
    for strip in chart["strips"]:
        assert len(strip["lines"]) == len(found.few)
        for line in strip["lines"]:
            assert line["within"] == (line["low"] <= chart["same"] <= line["high"])
            assert (line["value"] > chart["same"]) == line["error"].startswith("+")
    rows = [line["y"] for strip in chart["strips"] for line in strip["lines"]]
    assert all(below - above >= 13 for above, below in pairwise(rows)) and rows[-1] < chart["bottom"] < chart["height"]


def test_sources_constants_and_calibration_are_named(result: dict[str, Any]) -> None:
    known = copy.deepcopy(result)
    known["devices"][0]["calibrated"] = "here, 2026-11-22, 12 rows"
    for text in (render(known), markdown(known)):
        for device in known["devices"]:
            assert device["sources"][0] in text and "peak: cores x clock" in text
        assert "here, 2026-11-22, 12 rows" in text and "pooled: of others" in text and "memory.usable_gib" in text
    assert "Predicted without a calibration from this machine" in render(result) and "with the calibration here, 2026-11-22" in render(known)


def test_hostile_names_stay_text(result: dict[str, Any]) -> None:
    evil = "\"'><script>alert(1)</script>|<img src=x onerror=alert(1)>\n\n# a | b"
    bad = copy.deepcopy(result)
    bad["bundles"][0]["name"] = bad["command"] = evil
    bad["devices"][1].update(name=evil, engine=evil, weights=evil, sources=[evil], uncertain=[evil], calibrated=evil, peak_precision=evil)
    bad["devices"][2]["plans"]["pool-64"]["refused"] = evil
    for name, value in list(bad["devices"][1]["plans"].items()):
        bad["devices"][1]["plans"][name] = {**value, "way_out": evil, "verdict": "does not fit"}
    bad["machine"]["gauges"][0]["name"] = evil
    page = Reader(render(bad))
    assert [element.tag for element in page.elements].count("script") == 1
    assert not any(element.tag == "img" or name.startswith("on") for element in page.elements for name in element.attributes)
    text = markdown(bad)
    assert not re.search(r"(?<!\\)<(script|img)", text) and not re.search(r"^# a", text, re.M)
    numbers, calm = of_markdown(text), of_markdown(markdown(result))
    assert all(len(numbers[kind]) == len(found) for kind, found in calm.items() if kind)  # no cell was torn apart


def test_what_is_missing_is_left_out(result: dict[str, Any]) -> None:
    refused = copy.deepcopy(result)
    refused["devices"][1]["plans"] = {name: {"refused": "no CPU of this family was measured"} for name in refused["devices"][1]["plans"]}
    refused["devices"][3]["plans"] = {}
    for plan in refused["devices"][0]["plans"].values():
        del plan["vision_ms"]
        plan["work"] = {"decode": plan["work"]["decode"]}
    refused["compared"] = []
    page, said = Reader(render(refused)), markdown(refused)
    assert {row[1][0] for row in page.tables["glance"].rows} == {"✓ fits", "not predicted"}
    assert "Jetson Orin Nano 8GB</strong>: every plan: not predicted: no CPU of this family was measured." in render(refused)
    assert "compared" not in page.tables and "Predicted against measured" not in said
    assert page.tables["device-times"].groups[0].startswith("AMD") and page.tables["device-times"].rows[0][2][0] == DASH
    for plans in (result["plans"][:1], result["plans"][1:], result["plans"][1:2], []):
        for few in ({**result, "plans": plans}, {**refused, "plans": plans}):
            texts = render(few), markdown(few)
            assert not re.search(r"\b(None|nan|inf|Undefined)\b", re.sub(r"<style>.*?</style>|<script>.*?</script>", "", " ".join(texts), flags=re.S))
    for device in refused["devices"]:
        device["plans"] = {}
    assert "Nothing was predicted." in render(refused)


def test_a_screen_reader_finds_its_way(page: Reader) -> None:
    levels = [int(element.tag[1]) for element in page.elements if re.fullmatch(r"h\d", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(below <= above + 1 for above, below in pairwise(levels))
    for element in page.elements:
        if element.tag == "svg":
            named = element.attributes.get("role") in ("img", "group") and element.attributes.get("aria-label", "").strip()
            assert named or element.attributes.get("aria-hidden") == "true", element
        if element.tag == "th":
            assert element.attributes.get("scope") in ("col", "row", "rowgroup")
    assert all(table.caption.strip() for table in page.tables.values())
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    targets = [element.attributes["href"][1:] for element in page.elements if element.attributes.get("href", "").startswith("#")]
    assert len(ids) == len(set(ids)) and {*targets} <= {*ids}


def test_text_has_contrast() -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 of text in its colour on each ground that it stands on."""
    style = (Path(edgecomp.report.__file__).parent / "templates/style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block))
        for ink, ground in (("ink", "page"), ("soft", "page"), ("warn", "page"), ("k2", "page"), ("ink", "warn-page"), ("soft", "warn-page"),
                            ("page", "ink")):
            light, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@given(st.floats(1e-3, 1e6), st.floats(1.001, 1e9), st.integers(2, 12))
def test_logarithmic_ticks_are_inside_and_few(low: float, wide: float, most: int) -> None:
    found = log_ticks(low, low * wide, most)
    assert len(found) <= most and found == sorted(set(found))
    assert all(low * (1 - 1e-6) <= tick <= low * wide * (1 + 1e-6) and f"{tick:.0e}"[0] in "1235" for tick in found)
    assert len(found) >= min(most, 2) or wide < 100


def test_an_axis_keeps_what_lies_outside_at_its_ends() -> None:
    axis = Axis(1, 100, 10, 210, log=True)
    assert [axis.at(value) for value in (0.001, 1, 10, 100, 1e9)] == [10, 10, 110, 210, 210]
    assert [Axis(0, 4, 100, 0).at(value) for value in (-1, 0, 1, 4, 5)] == [100, 100, 75, 0, 0]


def test_numbers_of_predictions_are_for_people() -> None:
    assert [percent(value) for value in (None, 0.0, 0.083, -0.5, 1.4, 4.0)] == [DASH, "0 %", "+8.3 %", f"{MINUS}50 %", "+140 %", "5.0 times"]
    assert [metric(value) for value in (None, 0.629, 12.0, 68.2e9, 10.24e12)] == [DASH, "0.629", "12.0", "68.2 G", "10.2 T"]
    assert ms_span((5.0, 10.25)) == f"5.00{DASH}10.2" and ms_span((5000, 12000)) == f"5.00{DASH}12.0 s" and ms_span(None) == ""
    assert size_span((2**29, 2**30)) == f"512 MiB{DASH}1.00 GiB" and size_span((2**30, 2**31)) == f"1.00{DASH}2.00 GiB"


def test_the_verdict_s_plan_leads_at_its_budget(result: dict[str, Any]) -> None:
    marks = group(result["plans"])
    pick = verdict(marks).pick
    few = leaders(marks, pick)
    assert pick in few and [mark.budget for mark in few] == [576, 36, 64, 127, 256]
    assert [mark.name for mark in few] == ["full", "cls-36", "cls-64", "cls-127", "dart-256"]
    other = next(mark for mark in marks if mark.name == "pool-126")
    assert leaders(marks, other)[3] is other
