"""Benchmarks' files as they are published, made small here, and their metrics against oracles written another way."""
from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.cli import main
from edgecomp.datasets import LAYOUTS, read_questions
from edgecomp.datasets.base import SHORT
from edgecomp.datasets.docvqa import edits, similarity
from edgecomp.datasets.pope import further, reduced
from edgecomp.datasets.textvqa import agreement, plain
from edgecomp.evaluate import MOST_TOKENS, evaluate
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.errors import InputError, UnknownNameError

PEOPLE = ["nokia"] * 6 + ["Nokia 3310", "the nokia", "phone", ""]
PUBLISHED: dict[str, Any] = {
    "jsonl": [{"image": "images/a.jpg", "question": "how many?", "answer": 3, "task": "count"},
              {"image": "images/b.jpg", "question": "what is it?", "answer": "a ring"}],
    "pope": [{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?", "label": "yes"},
             {"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog in the image?", "label": "no"}],
    "textvqa": {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [
        {"question": "what is the brand of phone?", "image_id": "003a8ae2ef43b901", "image_classes": ["Cassette deck"], "answers": PEOPLE,
         "flickr_original_url": "https://example.org/1.jpg", "image_width": 1024, "image_height": 664, "question_id": 34602,
         "question_tokens": ["what", "is"], "set_name": "val"}]},
    "docvqa": {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": [
        {"questionId": 49153, "question": "What is the actual value per 1000?", "question_types": ["figure/diagram", "table/list"],
         "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81",
         "answers": ["0.28"], "data_split": "val"},
        {"questionId": 24580, "question": "Which company?", "image": "documents/nkbl0226_1.png", "docId": 7027, "ucsf_document_id": "nkbl0226",
         "ucsf_document_page_no": "1", "answers": ["itc limited", "ITC Limited"], "data_split": "val"}]},
    "gqa": {"201307251": {"semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}], "entailed": [], "equivalent": ["201307251"],
                          "question": "Is it overcast?", "imageId": "n161313", "isBalanced": True, "groups": {"global": None, "local": "10q-weather"},
                          "answer": "no", "semanticStr": "select: scene", "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
                          "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"}, "fullAnswer": "No, it is clear."}},
}
NAMES = {"jsonl": "questions.jsonl", "pope": "coco_pope_popular.json", "textvqa": "TextVQA_0.5.1_val.json", "docvqa": "val_v1.0_withQT.json",
         "gqa": "testdev_balanced_questions.json"}
# picture, question, answers, tasks, metric, as far as the benchmark says them
MEANT: dict[str, list[tuple[Any, ...]]] = {
    "jsonl": [("images/a.jpg", "how many?", ("3",), ("count",), "correct"), ("images/b.jpg", "what is it?", ("a ring",), ("all",), "correct")],
    "pope": [("COCO_val2014_000000310196.jpg", "Is there a snowboard in the image?", ("yes",), ("popular",), "correct"),
             ("COCO_val2014_000000310196.jpg", "Is there a dog in the image?", ("no",), ("popular",), "correct")],
    "textvqa": [("003a8ae2ef43b901.jpg", "what is the brand of phone?", tuple(PEOPLE), ("all",), "VQA accuracy")],
    "docvqa": [("documents/pybv0228_81.png", "What is the actual value per 1000?", ("0.28",), ("figure/diagram", "table/list"), "ANLS"),
               ("documents/nkbl0226_1.png", "Which company?", ("itc limited", "ITC Limited"), ("all",), "ANLS")],
    "gqa": [("n161313.jpg", "Is it overcast?", ("no",), ("verify",), "correct")],
}


def written(folder: Path, layout: str, content: Any = None, indent: int | None = None) -> Path:
    """A file in a layout, under the name that it is published under."""
    content = PUBLISHED[layout] if content is None else content
    lines = [json.dumps(row, ensure_ascii=False) for row in content] if isinstance(content, list) else [json.dumps(content, indent=indent)]
    (folder / NAMES[layout]).write_text("\n".join(lines), encoding="utf-8")
    return folder / NAMES[layout]


# ---- layouts ----

@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_published_file_is_read_as_it_is_meant(layout: str, chosen: bool, tmp_path: Path) -> None:
    found = read_questions(written(tmp_path, layout), layout if chosen else None)
    behind = "" if layout == "jsonl" else "\nAnswer the question using a single word or phrase."
    assert [(q.image, q.question, q.answers, q.tasks, q.metric.title) for q in found] == \
        [(tmp_path / image, asked + behind, *rest) for image, asked, *rest in MEANT[layout]]
    assert list(LAYOUTS) == list(PUBLISHED)


@pytest.mark.parametrize("layout", ["textvqa", "docvqa", "gqa"])
def test_a_json_over_many_lines_is_the_same(layout: str, tmp_path: Path) -> None:
    assert read_questions(written(tmp_path, layout, indent=2)) == read_questions(written(tmp_path, layout))


@pytest.mark.parametrize("layout", PUBLISHED)
def test_pictures_may_be_elsewhere_and_the_suffix_another(layout: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    file = written(tmp_path, layout)
    for suffix, behind in (("", ""), ("Be brief.", "\nBe brief.")):
        assert [(q.image, q.question) for q in read_questions(file, image_folder=pictures, suffix=suffix)] == \
            [(pictures / image, asked + behind) for image, asked, *_ in MEANT[layout]]


def test_the_split_of_pope_is_its_name_or_what_a_record_says(tmp_path: Path) -> None:
    row = PUBLISHED["pope"][0]
    both = written(tmp_path, "pope", [row, {**row, "category": "adversarial"}])
    assert [q.tasks for q in read_questions(both)] == [("popular",), ("adversarial",)]
    assert [q.tasks for q in read_questions(both.rename(tmp_path / "mine.json"))] == [("all",), ("adversarial",)]


def test_the_answer_that_most_people_gave(tmp_path: Path) -> None:
    assert read_questions(written(tmp_path, "textvqa"))[0].answer == "nokia"
    assert read_questions(written(tmp_path, "docvqa"))[1].answer == "itc limited"


def without(layout: str, key: str, **changed: Any) -> Any:
    """A layout's content, its last record without a key and with others."""
    content = json.loads(json.dumps(PUBLISHED[layout]))
    rows = content if isinstance(content, list) else content["data"] if "data" in content else list(content.values())
    rows[-1].pop(key, None)
    rows[-1].update(changed)
    return content


@pytest.mark.parametrize(("layout", "content", "telling"), [
    ("pope", without("pope", "label"), "line 2: not an object with image, text and label (KeyError: 'label')"),
    ("pope", without("pope", "", label="maybe"), "line 2: not an object with image, text and label (ValueError: the label 'maybe' is neither yes"),
    ("pope", without("pope", "", text=""), "line 2: not an object with image, text and label (ValueError: the text is empty)"),
    ("textvqa", without("textvqa", "", answers=["a"] * 9), "record 1: not an object with image_id, question and answers (ValueError: there are 9 a"),
    ("textvqa", without("textvqa", "", answers="a"), "record 1: not an object with image_id, question and answers (TypeError: 'answers' is no list"),
    ("textvqa", without("textvqa", "answers"), "record 1: its keys (question, image_id, "),
    ("docvqa", without("docvqa", "", answers=[]), "record 2: not an object with image, question and answers (ValueError: there are no answers)"),
    ("docvqa", without("docvqa", "image"), "record 2: not an object with image, question and answers (KeyError: 'image')"),
    ("gqa", without("gqa", "", question=None), "question 201307251: not an object with imageId, question and answer (TypeError: 'question' is no"),
    ("gqa", without("gqa", "answer"), "question 201307251: its keys (semantic, "),
    ("gqa", {"data": []}, "has no questions"),
    ("gqa", {"data": [1]}, "record 1: not an object with image, question and answer (TypeError: it is a int)"),
    ("gqa", {}, "line 1: its keys (none) are of no layout that is known: choose one with --layout (jsonl, pope, textvqa, docvqa, gqa)"),
])
def test_what_does_not_fit_is_named(layout: str, content: Any, telling: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_questions(written(tmp_path, layout, content))
    assert str(raised.value).startswith(str(tmp_path / NAMES[layout])) and telling in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_layout_than_the_files_is_said(tmp_path: Path) -> None:
    file = written(tmp_path, "pope")
    with pytest.raises(InputError, match=r"line 1: not an object with imageId, question and answer \(KeyError: 'imageId'\)"):
        read_questions(file, "gqa")
    with pytest.raises(UnknownNameError, match="unknown layout 'textvq'; did you mean 'textvqa'"):
        read_questions(file, "textvq")
    with pytest.raises(InputError, match="nowhere is not a folder: give the one that the questions' pictures are in"):
        read_questions(file, image_folder=tmp_path / "nowhere")


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    file = written(tmp_path, "textvqa")
    file.write_text(file.read_text()[:-30])
    with pytest.raises(InputError, match=r"line 1: not an object with image, question and answer \(JSONDecodeError"):
        read_questions(file)


# ---- metrics ----

@pytest.mark.parametrize(("said", "meant"), [
    ("Yes", "yes"), ("No", "no"), ("no.", "no"), ("No, there is a cat.", "no"), ("There is no dog in the image.", "no"), ("It is not there", "no"),
    ("Yes. There is no other.", "yes"), ("I see nothing", "yes"), ("", "yes"), ("NO", "yes"), ("Nope. No", "yes"), ("no\nyes", "yes"), (",no", "no")])
def test_popes_reading_of_an_answer(said: str, meant: str) -> None:
    assert reduced(said) == meant


@given(st.lists(st.tuples(st.sampled_from(["yes", "No.", "there is not"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=12))
def test_popes_further_figures(pairs: list[tuple[str, str]]) -> None:
    counts = {key: sum((said == "yes", label == "yes") == key for said, label in pairs) for key in itertools.product([True, False], repeat=2)}
    hit, wrong, missed = counts[True, True], counts[True, False], counts[False, True]
    precision = Fraction(hit, hit + wrong) if hit + wrong else Fraction(0)
    recall = Fraction(hit, hit + missed) if hit + missed else Fraction(0)
    both = 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)
    assert further([(said, (label,)) for said, label in pairs]) == pytest.approx(
        {"precision": float(precision), "recall": float(recall), "F1": float(both), "said yes": (hit + wrong) / len(pairs)})


@pytest.mark.parametrize(("said", "compared"), [
    ("The Nokia", "nokia"), ("a cat and an owl", "cat and owl"), ("three", "3"), ("None", "0"), ("10,000", "10000"), ("3.5", "3.5"),
    ("U.S.A.", "usa"), ("5 p.m.", "5 pm"), ("don't", "don't"), ("Dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
    ("coca-cola", "coca cola"), ("coca - cola", "coca cola"), ("-40", "40"), ("what?", "what"), ("mcdonald's", "mcdonald 's"), ("2:50", "2:50"),
    ("b/c; d/e", "b c d e"), ("hello\nworld", "hello world"), ("  The  ", ""), ("yes!", "yes"), ("e-mail (new)", "e mail new"), ("ten, nine", "10 9"),
    ("twas", "'twas")])
def test_what_vqa_compares(said: str, compared: str) -> None:
    assert plain(said) == compared


def left_out_in_turn(said: str, answers: Sequence[str]) -> float:
    """The mean over all sets of nine people of min(those who say the same / 3, 1)."""
    sets = list(itertools.combinations(answers, len(answers) - 1))
    return float(sum(min(Fraction(sum(a == said for a in others), 3), Fraction(1)) for others in sets) / len(sets))


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_those_who_agree(agreeing: int, score: float) -> None:
    answers = ["a red  Ring."] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert agreement("red ring", tuple(answers)) == pytest.approx(score) == left_out_in_turn("a red  Ring.", answers)
    assert agreement("x", tuple(answers)) == 0


@given(st.lists(st.sampled_from("bcd"), min_size=10, max_size=10), st.sampled_from("bcd"))
def test_vqa_accuracy_leaves_each_person_out(answers: list[str], said: str) -> None:
    assert agreement(said, tuple(answers)) == pytest.approx(left_out_in_turn(said, answers))
    assert 0 <= agreement(said, tuple(answers)) <= 1


def recursive(a: str, b: str) -> int:
    """Levenshtein's distance as it is defined."""
    @functools.cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (a[i] != b[j]))
    return rest(0, 0)


@settings(deadline=None)
@given(st.text("abc ", max_size=9), st.text("abC ", max_size=9))
def test_edits_and_similarity(a: str, b: str) -> None:
    assert edits(a, b) == edits(b, a) == recursive(a, b)
    a, b = " ".join(a.split()), " ".join(b.split())
    part = Fraction(recursive(a.lower(), b.lower()), max(len(a), len(b), 1))
    assert similarity(a, (b,)) == pytest.approx(float(1 - part) if part <= Fraction(1, 2) else 0)
    assert similarity(a, (b, a.upper())) == 1


@pytest.mark.parametrize(("said", "answers", "score"), [
    ("Denver Broncos", ("Denver Broncos", "Denver R. Broncos"), 1), ("12/15/89", ("12/15/88",), 7 / 8),
    ("Dear dr. Lobo", ("Dear Dr. Lobo", "Dr. Lobo"), 1), ("ab", ("ac",), 0.5),
    ("abc", ("axy",), 0), ("", ("x",), 0), ("New  York", ("new york",), 1),
    ("kitten", ("sitting",), 1 - 3 / 7)])
def test_anls_of_examples(said: str, answers: tuple[str, ...], score: float) -> None:
    assert similarity(said, answers) == pytest.approx(score)


# ---- at work ----

@pytest.fixture(scope="module")
def benchmarks(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Questions about two scenes, told in turn, in every layout; and what they were made of. Pictures are beside, except POPE's."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()]
    by_picture = [[r for r in rows if r["image"] == f"images/scene-{n:02}.jpg"][:4] for n in (3, 5)]
    rows = [row for pair in zip(*by_picture) for row in pair]
    (folder / "val2014").mkdir()
    for row in rows:
        row["image"] = Path(row["image"]).name
        shutil.copy(scenes / "images" / row["image"], folder)
    asked = [r for r in rows if r["answer"] in ("yes", "no")]
    for row in asked:
        shutil.copy(folder / row["image"], folder / "val2014")
    stems = [Path(r["image"]).stem for r in rows]
    written(folder, "jsonl", rows)
    written(folder, "pope", [{"question_id": n, "image": r["image"], "text": r["question"], "label": r["answer"]} for n, r in enumerate(asked, 1)])
    written(folder, "textvqa", {"data": [{"question_id": n, "image_id": stem, "question": r["question"],
                                          "answers": [r["answer"]] * 2 + ["x"] * 8} for n, (stem, r) in enumerate(zip(stems, rows))]})
    written(folder, "docvqa", {"data": [{"questionId": n, "image": r["image"], "question": r["question"], "answers": [r["answer"] + "e"],
                                         "question_types": ["form", r["task"]]} for n, r in enumerate(rows)]})
    written(folder, "gqa", {f"0{n}": {"imageId": stem, "question": r["question"], "answer": r["answer"], "types": {"structural": r["task"]}}
                            for n, (stem, r) in enumerate(zip(stems, rows))})
    return folder, rows


@pytest.fixture(scope="module")
def session(demo: Path) -> Session:
    return Session(Bundle.open(demo), plan="pool-64")


@pytest.fixture(scope="module")
def answers(benchmarks: tuple[Path, list[dict[str, str]]], session: Session) -> list[str]:
    """What the session says to each question."""
    folder, rows = benchmarks
    return [session.generate(row["question"], [folder / row["image"]], max_new_tokens=MOST_TOKENS).finish().strip() for row in rows]


@pytest.mark.parametrize("layout", PUBLISHED)
def test_eval_judges_by_the_benchmarks_metric(layout: str, benchmarks: tuple[Path, list[dict[str, str]]], demo: Path, answers: list[str]) -> None:
    folder, rows = benchmarks
    options = ["--data", str(folder / NAMES[layout]), "--suffix", "", *(["--image-folder", str(folder / "val2014")] if layout == "pope" else [])]
    result = CliRunner().invoke(main, ["eval", str(demo), "--plan", "pool-64", "--json", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    scores: dict[str, list[float]] = {}
    for row, said in zip(rows, answers):
        if layout == "pope" and row["answer"] not in ("yes", "no"):
            continue
        same = " ".join(said.lower().split()).rstrip(".") == row["answer"]
        distance = recursive(said.lower(), row["answer"] + "e") / max(len(said), len(row["answer"]) + 1)
        score = {"jsonl": float(same), "gqa": float(same), "textvqa": 0.6 * same, "pope": float(("no" in said.split()) == (row["answer"] == "no")),
                 "docvqa": 1 - distance if distance <= 0.5 else 0.0}[layout]
        tasks = {"pope": ["popular"], "textvqa": ["all"], "docvqa": ["form", row["task"]]}.get(layout, [row["task"]])
        for task in tasks:
            scores.setdefault(task, []).append(score)
    assert found["metric"] == MEANT[layout][0][-1]
    assert found["by_task"] == pytest.approx({task: 100 * sum(values) / len(values) for task, values in sorted(scores.items())})
    whole = scores["form"] if layout == "docvqa" else [value for values in scores.values() for value in values]
    assert found["questions"] == len(whole) and found["accuracy"] == pytest.approx(100 * sum(whole) / len(whole))
    assert found["accuracy"] > 0 and ("F1" in found.get("further", {})) == (layout == "pope")


def test_eval_prints_a_table(benchmarks: tuple[Path, list[dict[str, str]]], demo: Path) -> None:
    folder, rows = benchmarks
    result = CliRunner().invoke(main, ["eval", str(demo), "--plan", "pool-64", "--data", str(folder / NAMES["docvqa"]), "--backend", "null"])
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["task", "ANLS", "%", "questions"] and table[-1][0] == "all" and table[-1][-1] == str(len(rows))
    assert [line[0] for line in table[1:-1]] == sorted({"form", *(row["task"] for row in rows)})
    options = ["--data", str(folder / NAMES["pope"]), "--image-folder", str(folder / "val2014"), "--backend", "null"]
    last = CliRunner().invoke(main, ["eval", str(demo), *options]).stdout.splitlines()[-1]
    assert last.startswith("precision ") and "F1 " in last and "said yes " in last


def test_the_suffix_is_asked_and_answers_come_in_the_order_of_the_questions(benchmarks: tuple[Path, list[dict[str, str]]], session: Session) -> None:
    folder, rows = benchmarks
    ticks: list[int] = []
    answers = evaluate(session, read_questions(folder / NAMES["gqa"]), lambda: ticks.append(1))
    assert [a.question.image.name for a in answers] == [row["image"] for row in rows] and len(ticks) == len(rows)
    assert len({row["image"] for row in rows[:2]}) == 2  # they are told in turn
    for answer, row in zip(answers, rows):
        expected = session.generate(f"{row['question']}\n{SHORT}", [folder / row["image"]], max_new_tokens=MOST_TOKENS).finish().strip()
        assert answer.said == expected


def test_a_picture_that_is_missing_is_said_before_anything_is_asked(benchmarks: tuple[Path, list[dict[str, str]]], session: Session,
                                                                    tmp_path: Path) -> None:
    questions = read_questions(written(tmp_path, "gqa"))
    with pytest.raises(InputError, match=r"n161313.jpg: no such file; the questions name it relative to their own file, or to --image-folder"):
        evaluate(session, questions)
