"""TextVQA: reading what is written in a picture (arXiv 1904.08920)."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecomp.datasets.base import SHORT, Layout, Metric, Question, text, texts

PEOPLE = 10  # who answered each question
ENOUGH = 3  # of the others who say the same make an answer right
MARKS = ";/[]\"{}()=+\\_-><@`,?!"
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
           "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# as written with one apostrophe missing: as it should be
CONTRACTIONS = {word[:n] + word[n + 1:]: word for word in WHOLE.split() for n, letter in enumerate(word) if letter == "'"}


def question(row: Mapping[str, Any], file: Path) -> Question:
    """`TextVQA_0.5.1_val.json` is {data: [{question_id, image_id, question, answers, ...}]}, answers being those of ten people; pictures
    are <image_id>.jpg. The test split has no answers. (LLaVA-1.5's figures were made with the text that an OCR engine had found put
    into the question; without it they are lower.)
    """
    answers = texts(row, "answers")
    if len(answers) != PEOPLE:
        raise ValueError(f"there are {len(answers)} answers, not {PEOPLE}")
    return Question(Path(text(row, "image_id") + ".jpg"), text(row, "question"), answers, metric=METRIC)


def agreement(said: str, answers: tuple[str, ...]) -> float:
    """VQA accuracy (visualqa.org/evaluation.html): each person left out in turn, a third for everyone else who says the same, at most 1;
    averaged."""
    same = [plain(answer) == plain(said) for answer in answers]
    return sum(min((sum(same) - mine) / ENOUGH, 1.0) for mine in same) / len(same)


def plain(said: str) -> str:
    """An answer as VQA's evaluation compares it, in the form that TextVQA's own has it (MMF's processor for EvalAI).

    Lower case; no commas and question marks; a genitive's 's a word of its own; other marks dropped where one stands at a space,
    else a space in their place; no full stops but before a digit; numbers up to ten as digits; no articles; the
    apostrophes that contractions lack. Apostrophes and colons stay.
    """
    said = re.sub(r"[\n\t]", " ", said.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()).strip()
    found = said
    for mark in MARKS:
        found = found.replace(mark, "" if f" {mark}" in said or f"{mark} " in said else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", found).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


METRIC = Metric("VQA accuracy", agreement)
LAYOUT = Layout("textvqa", "TextVQA_0.5.1_val.json; VQA accuracy", ("image_id", "question", "answers"), question, METRIC, SHORT)
