"""`edgecomp sweep` on the demonstration model: what it measures, what it leaves out, and how it goes on where it was ended."""
from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from edgecomp import methods
from edgecomp.cli import main
from edgecomp.compress import Recipe, Stage
from edgecomp.evaluate import accuracy, evaluate, read_questions
from edgecomp.sweep.job import Job, cell_file, model_hash, read_cell
from edgecomp.sweep.planning import Plans, combinations
from edgecomp.sweep.running import go_on
from edgecomp.sweep.selector import selector_ms
from edgecomp.sweep.tables import loses_to
from edgecomp_runtime import Bundle, Session

CHOSEN = ("--method", "cls", "--method", "fastv", "--keep", "64", "--seeds", "0,1")
BASELINES = {f"{name}{at}" for name in ("random-64", "random-64-seed1", "pool-64") for at in ("", "-decoder2")}
PLANS = {"full", "cls-64", "fastv-64-decoder2", *BASELINES}


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions about two pictures."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["image"] < "images/scene-02" and row["task"] in ("where", "number")][:4]
    path.write_text("\n".join(json.dumps({**row, "image": str(scenes / row["image"])}) for row in chosen))
    return path


@pytest.fixture(scope="module")
def swept(demo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    result = CliRunner().invoke(main, ["sweep", str(demo), "-o", str(folder), *CHOSEN, "--data", str(data), "--repeats", "1", "--threads", "1"])
    assert result.exit_code == 0, result.output
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["rows"]
    return found


def test_a_row_has_what_other_ways_of_measuring_find(swept: Path, data: Path) -> None:
    rows = {row["plans"][0]: row for row in rows_of(swept)}
    assert {plan for row in rows.values() for plan in row["plans"]} == PLANS and len(rows) == 7
    bundle, questions = Bundle.open(swept / "bundle"), read_questions(data)
    for name in ("full", "cls-64", "fastv-64-decoder2"):
        row, session = rows[name], Session(bundle, plan=name, threads=1)
        assert row["accuracy"] == pytest.approx(accuracy(evaluate(session, questions)))
        first = {q.image: q.question for q in reversed(questions)}
        kept = [list(session.kept(str(image), first[image]).values())[-1].tolist() for image in first]
        shares = [len({(k // 24 // 3, k % 24 // 3) for k in one}) / 64 for one in kept]
        assert row["coverage"] == pytest.approx(sum(shares) / 2)
    both = [read_cell(swept, plan)["answers"]["all"] for plan in ("random-64", "random-64-seed1")]
    random = rows["random-64"]
    assert (random["accuracy"], random["accuracy_low"], random["accuracy_high"]) == pytest.approx((sum(both) / 2, min(both), max(both)))
    assert random["plans"] == ["random-64", "random-64-seed1"] and random["seeds"] == [0, 1]


def test_counts_times_and_bytes(swept: Path) -> None:
    rows = {row["plans"][0]: row for row in rows_of(swept)}
    assert [rows[n][k] for n in ("full", "cls-64", "fastv-64-decoder2") for k in ("tokens_entering", "tokens_after", "tokens_mean")] == [
        576, 576, 576, 64, 64, 64, 576, 64, (2 * 576 + 6 * 64) / 8]
    layer = 2 * 64 * 4  # bytes of a row's keys and values: one head of 64 in fp32
    assert rows["fastv-64-decoder2"]["cache_bytes"] == layer * (2 * 2048 + 6 * (2048 - 512)) and rows["cls-64"]["cache_bytes"] == layer * 8 * 1536
    for row in rows.values():
        assert all(0 < row[phase]["low"] <= row[phase]["median"] <= row[phase]["high"] for phase in ("vision_ms", "prefill_ms", "decode_ms"))
        assert row["first_token_ms"]["median"] > row["prefill_ms"]["median"]
    assert all(0 < rows[n]["selector_ms"] < rows[n]["first_token_ms"]["median"] / 4 for n in ("cls-64", "fastv-64-decoder2"))
    assert rows["random-64"]["selector_ms"] is None and rows["full"]["position_correlation"] is None
    assert rows["full"]["coverage"] == 1 and rows["full"]["entropy"] == pytest.approx(1) and rows["pool-64"]["coverage"] == 1


def test_the_tower_runs_once_a_picture_for_all_plans_that_share_it(swept: Path) -> None:
    seen = {plan: read_cell(swept, plan)["answers"]["pictures_seen"] for plan in PLANS}
    assert sum(count for plan, count in seen.items() if plan == "full" or plan.endswith("decoder2")) == 2
    assert all(seen[plan] == 2 for plan in ("cls-64", "random-64", "random-64-seed1", "pool-64"))


def test_csv_and_page(swept: Path) -> None:
    lines = list(csv.DictReader((swept / "sweep.csv").read_text().splitlines()))
    rows = rows_of(swept)
    assert [line["method"] for line in lines] == [row["method"] for row in rows]
    for line, row in zip(lines, rows):
        assert float(line["accuracy"]) == pytest.approx(row["accuracy"], abs=1e-3)
        assert float(line["vision_ms"]) == pytest.approx(row["vision_ms"]["median"], abs=1e-3)
        assert float(line["accuracy where"]) == pytest.approx(row["by_task"]["where"], abs=1e-3)
        assert line["loses_to"] == " and ".join(row["loses_to"]) and line["seeds"] == " and ".join(map(str, row["seeds"]))
    page = (swept / "report.html").read_text()
    assert all(f">{plan}<" in page or f"{plan}\n" in page for plan in PLANS)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgecomp", "sweep", *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def end_after(child: subprocess.Popen[str], line: str, number: int) -> tuple[int, list[str]]:
    """Sends a signal when a line of stderr starts so. Returns the exit code and all lines; no process of the child's is left."""
    assert child.stderr is not None
    lines = []
    for said in child.stderr:
        lines.append(said.rstrip())
        if said.startswith(line):
            workers = psutil.Process(child.pid).children(recursive=True)
            assert workers
            child.send_signal(number)
            break
    lines += child.stderr.read().splitlines() if number == signal.SIGINT else []
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    return child.wait(), lines


def test_ended_twice_it_goes_on_and_finds_the_same(demo: Path, data: Path, swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    args = (demo, "-o", folder, *CHOSEN, "--data", data, "--repeats", 0)
    code, lines = end_after(start(*args), "answers 1 of 9", signal.SIGINT)
    assert code == 130 and lines[-1] == f"ended; what is finished is in {folder / 'cells'}, and the same command goes on from there"
    done = len(list((folder / "cells").glob("*.json")))
    assert 1 <= done < 9
    code, lines = end_after(start(*args), f"answers 2 of {9 - done}", signal.SIGKILL)
    assert code == -signal.SIGKILL and f"{done} of 9 cells have their answers already" in lines
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert done + 2 <= len(before) < 9 and not (folder / "sweep.csv").exists()
    result = CliRunner().invoke(main, ["sweep", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    assert {name: (folder / "cells" / name).stat().st_mtime_ns for name in before} == before
    same = ("plans", "accuracy", "by_task", "coverage", "entropy", "position_correlation", "loses_to", "tokens_mean")
    found = json.loads(result.stdout)
    assert [[row[key] for key in same] for row in found] == [[row[key] for key in same] for row in rows_of(swept)]
    assert all(row["vision_ms"] is row["selector_ms"] is None for row in found)


def part_of(swept: Path, folder: Path, plans: tuple[str, ...], **changes: Any) -> Path:
    """A copy of a sweep with some of its cells in its job."""
    shutil.copytree(swept, folder, copy_function=os.link)
    shutil.rmtree(folder / "cells")
    shutil.copytree(swept / "cells", folder / "cells")
    job = Job.load(swept)
    dataclasses.replace(job, cells=tuple(c for c in job.cells if c.plan in plans), repeats=0, **changes).save(folder)
    return folder


def test_another_question_or_a_damaged_file_makes_cells_anew_and_nothing_else_does(swept: Path, data: Path, tmp_path: Path) -> None:
    folder, said = part_of(swept, tmp_path / "sweep", ("cls-64", "random-64")), list[str]()
    before = {plan: cell_file(folder, plan).read_bytes() for plan in ("cls-64", "random-64")}
    go_on(folder, threads=1, say=said.append)
    assert said == ["2 of 2 cells have their answers already"]
    assert {plan: cell_file(folder, plan).read_bytes() for plan in before} == before
    cell_file(folder, "cls-64").write_bytes(before["cls-64"][:200])
    rows, failed = go_on(folder, threads=1, say=said.append)
    assert len(rows) == 2 and not failed and "1 of 2 cells have their answers already" in said
    assert read_cell(folder, "cls-64")["answers"]["all"] == json.loads(before["cls-64"])["answers"]["all"] > 0
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({**json.loads(line), "answer": "nowhere"}) for line in data.read_text().splitlines()))
    dataclasses.replace(Job.load(folder), data=str(other)).save(folder)
    said.clear()
    rows, _ = go_on(folder, threads=1, say=said.append)
    assert "answers of 2 cells were measured with other values (data): again" in said
    assert [row["accuracy"] for row in rows] == [0, 0]


def test_a_changed_weight_is_another_model(swept: Path) -> None:
    bundle = Bundle.open(swept / "bundle")
    assert model_hash(bundle, "cls-64") == model_hash(bundle, "cls-64") != model_hash(bundle, "random-64")
    weights = next(name for name in bundle.manifest.files if name.endswith(".bin"))
    files = {**bundle.manifest.files, weights: dataclasses.replace(bundle.manifest.files[weights], sha256="0" * 64)}
    assert model_hash(Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=files)), "cls-64") != model_hash(bundle, "cls-64")


def test_cells_are_measured_without_the_compilers_packages_by_several_processes(swept: Path, data: Path, tmp_path: Path) -> None:
    folder = part_of(swept, tmp_path / "sweep", ("cls-64", "fastv-64-decoder2"), data="/elsewhere/questions.jsonl")
    shutil.rmtree(folder / "cells")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(
        "import sys\nclass Missing:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('onnx', 'onnx_ir', 'onnxscript', 'torch', 'transformers', 'click'):\n"
        "            raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Missing())\n")
    environment = {**os.environ, "PYTHONPATH": str(bare)}
    assert subprocess.run([sys.executable, "-c", "import onnx_ir"], env=environment, capture_output=True).returncode == 1
    result = subprocess.run([sys.executable, "-m", "edgecomp.sweep", folder, "--data", data, "--jobs", "2", "--threads", "1"], env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 cells have 4 questions about 2 pictures to answer each, in 2 processes" in result.stderr
    assert [row["accuracy"] for row in rows_of(folder)] == [row["accuracy"] for row in rows_of(swept) if row["method"] in ("cls", "fastv")]


def test_what_cannot_be_made_is_left_out_and_the_baselines_are_always_there(demo: Path) -> None:
    plans = Plans(Bundle.open(demo).manifest, (0, 1, 2))
    plans.add(combinations([methods.make("cls"), methods.make("fastv")], ["64", "67", "9999"], ["projector", "decoder:3"], ["keep", "compact"]))
    made = {(c.method, c.site, c.position, c.budgets) for c in plans.cells.values() if c.method != "none"}
    for site, method in (("projector", "cls"), ("decoder:3", "fastv")):
        for position in ("keep", "compact"):
            for budget in (64, 67):
                assert {(m, site, position, (budget,)) for m in (method, "random", "pool")} <= made
                at = [c for c in plans.cells.values() if (c.site, c.position, c.keep) == (site, position, budget)]
                assert [c.seed for c in at if c.method == "random"] == [0, 1, 2]
    assert {c.keep for c in plans.cells.values() if c.method == "pool" and 67 in c.budgets} == {66}  # 6 x 11; 67 is prime
    assert {(c.method, c.site) for c in plans.cells.values()} == {("none", ""), *(pair for s, m in (("projector", "cls"), ("decoder:3", "fastv"))
                                                                                    for pair in ((m, s), ("random", s), ("pool", s)))}
    reasons = {s.combination: s.reason for s in plans.skipped}
    assert "cannot stand at 'decoder:3'" in reasons["cls to 64 at decoder:3"]
    assert "cannot stand at 'projector'" in reasons["fastv to 67 at projector, compact"]
    assert "9999 is outside" in reasons["cls to 9999 at projector"]
    assert len(plans.skipped) == 2 * (2 * 3 + 2)  # positions, of: two methods with three budgets where they cannot stand, and one budget too many


def test_windows_and_stages(demo: Path) -> None:
    plans = Plans(Bundle.open(demo).manifest, (0,))
    plans.add(combinations([methods.make("cls")], ["64"], windows=[(1, 1), (4, 4)]))
    plans.add([Recipe((Stage(methods.make("pool"), "144", "projector"), Stage(methods.make("fastv"), "36", "decoder:2")))])
    assert list(plans.cells) == ["full", "cls-64", "random-64", "pool-64", "cls-64-windows4x4", "pool-144+fastv-36-decoder2",
                                 "random-36-decoder2", "pool-36-decoder2", "pool-36"]
    assert plans.cells["cls-64"].timing == plans.cells["cls-64-windows4x4"].timing == "random-64"
    assert plans.cells["pool-144+fastv-36-decoder2"].timing == "random-144+random-36-decoder2"  # no cell: it is there to be timed against


def row(method: str, accuracy: float, site: str = "projector", budget: int = 64, **more: Any) -> dict[str, Any]:
    return {"method": method, "accuracy": accuracy, "site": site, "sites": [site], "position": "keep", "windows": "", "keep": budget,
            "budgets": [budget], **more}


def test_what_loses_to_what() -> None:
    near = {"keep": 66, "budgets": [67]}
    rows = [row("random", 50.0), row("pool", 60.0), row("random", 30.0, "decoder:2"), row("pool", 40.0, "decoder:2"), row("random", 99.0, budget=32),
            row("random", 99.0, position="compact"), row("pool", 99.0, windows="4x4"), row("pool", 80.0, **near)]
    for found, lost in (
        (row("cls", 60.0), []), (row("cls", 55.0), ["pool"]), (row("cls", 49.9), ["random", "pool"]), (row("cls", 60.0 - 1e-12), []),
        (row("fastv", 45.0, "decoder:2"), ["pool at projector"]), (row("fastv", 29.0, "decoder:2"), ["random", "pool", "pool at projector"]),
        (row("cls", 70.0, budget=67), ["pool"]), (row("cls", 10.0, budget=128), []), (row("cls", 98.0, position="compact"), ["random"]),
        (row("cls", 55.0, windows="4x4"), ["pool"]), (row("none", 0.0), []),
    ):
        assert list(loses_to(found, [*rows, found])) == lost, found
    assert [loses_to(one, rows) for one in rows[:4]] == [{}, {}, {}, {"pool at projector": 60.0}]
    assert loses_to(row("pool", 45.0), [rows[0]]) == {"random": 50.0}


def test_a_selectors_time_is_that_of_its_own_nodes() -> None:
    twin = {("MatMul", "a", "b"): (8.0, 10.0), ("GroupQueryAttention", "a", "b"): (8.0, 2.0), ("Expand", "c", "d"): (1.0, 0.25)}
    mine = {("MatMul", "a", "b"): (9.0, 11.0), ("GroupQueryAttention", "a", "b"): (8.0, 3.0), ("TopK", "e", "f"): (2.0, 0.5)}
    assert selector_ms(mine, twin) == pytest.approx(11.0 + 2 * 0.5 - 0.25)
    assert selector_ms({**mine, ("GroupQueryAttention", "a", "b"): (7.0, 3.0)}, twin) is None


@pytest.mark.parametrize(("change", "said"), [
    (["--method", "cls"], "a sweep needs at least one --method and one --keep"),
    (["--method", "random:seed=3", "--keep", "64"], "seeds are given to all methods that have one, by --seeds"),
    (["--method", "cls", "--keep", "64", "--seeds", "0,a"], "is not whole numbers such as 0,1,2"),
    (["--step", "cls:projector:64", "--site", "projector"], "--site is of a --method"),
    (["--method", "fastv", "--keep", "64", "--site", "projector"], "none of this can be made: fastv to 64 at projector"),
    (["--method", "cls", "--keep", "64", "--image-folder", "nowhere"], "nowhere is not a folder"),
])
def test_what_is_refused(change: list[str], said: str, demo: Path, data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sweep", str(demo), "-o", str(tmp_path / "sweep"), "--data", str(data), *change])
    assert result.exit_code != 0 and said in " ".join(result.stderr.split())


def test_a_folder_with_other_things_is_left_alone(demo: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(main, ["sweep", str(demo), "-o", str(tmp_path), *CHOSEN, "--data", str(data)])
    assert result.exit_code == 1 and "exists and is no sweep" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    gone = subprocess.run([sys.executable, "-m", "edgecomp.sweep", tmp_path], capture_output=True, text=True)
    assert gone.returncode == 1 and "is no sweep" in gone.stderr and "Traceback" not in gone.stderr
