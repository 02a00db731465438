"""The generation loop: reuse, cancelling, stopping, sampling, the window. What it says is checked in tests/export."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgecomp_runtime import Bundle, InputError, Session
from edgecomp_runtime.backends.onnxruntime import OnnxRuntimeBackend
from edgecomp_runtime.generation import StopTexts
from edgecomp_runtime.rows import Layout, Run, VisualTokens, lay_out


@pytest.fixture(scope="module")
def session(demo: Path) -> Session:
    return Session(Bundle.open(demo), plan="cls-64")


@pytest.fixture
def picture(scenes: Path) -> Path:
    return scenes / "images" / "scene-03.jpg"


def user(*texts: str, images: int = 0) -> dict[str, object]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, *({"type": "text", "text": t} for t in texts)]}


def test_a_later_turn_prefills_only_its_new_rows_and_says_the_same(session: Session, demo: Path, picture: Path) -> None:
    session.reset()
    first = session.generate("what number is written?", [picture])
    said = first.finish().strip()
    answered = {"role": "assistant", "content": [{"type": "text", "text": said}]}
    turns = [user("what number is written?", images=1), answered, user("what color is the star?")]
    second = session.generate(turns, [picture])
    answer = second.finish()
    fresh = Session(Bundle.open(demo), plan="cls-64").generate(turns, [picture])
    assert answer == fresh.finish()
    assert second.token_ids == fresh.token_ids
    assert first.statistics.reused_rows == 0
    assert second.statistics.reused_rows >= first.statistics.prompt_rows, "the first turn's rows, picture included, are not computed again"
    assert fresh.statistics.reused_rows == 0


def test_reuse_never_changes_an_answer(session: Session, scenes: Path) -> None:
    pictures = [scenes / "images" / f"scene-{n:02d}.jpg" for n in (3, 5)]
    asked = [(0, "what number is written?"), (0, "what number is there?"), (1, "what number is written?"), (0, "describe the image."),
             (0, "describe the image."), (1, "describe"), (0, "what number is written?")]
    said = {}
    for which, question in asked:
        session.reset()
        said[which, question] = session.generate(question, [pictures[which]], max_new_tokens=24).finish()
    session.reset()
    for which, question in asked:
        assert session.generate(question, [pictures[which]], max_new_tokens=24).finish() == said[which, question]


def test_an_abandoned_answer_does_not_spoil_the_next(session: Session, picture: Path) -> None:
    session.reset()
    whole = session.generate("describe the image.", [picture]).finish()
    half = session.generate("describe the image.", [picture])
    next(half)
    next(half)
    assert session.generate("describe the image.", [picture]).finish() == whole
    with pytest.raises(InputError, match="a newer call of this session's generate took over"):
        next(half)


def test_paths_pictures_and_frames_are_the_same(session: Session, picture: Path) -> None:
    image = Image.open(picture).convert("RGB")
    forms = (picture, str(picture), image, np.asarray(image))
    assert len({session.generate("describe the image.", [form], max_new_tokens=12).finish() for form in forms}) == 1


def test_the_stream_is_the_text_and_the_statistics_are_of_this_call(session: Session, picture: Path) -> None:
    session.reset()
    generation = session.generate("describe the image.", [picture])
    pieces = list(generation)
    took = generation.statistics
    assert "".join(pieces) == generation.text == session.text.decode(generation.token_ids)
    assert len(pieces) > 5
    assert (took.visual_tokens_in, took.visual_tokens_kept) == (576, 64)
    assert took.prompt_rows == 64 + len(session.text.encode(session.text.render([user("describe the image.", images=1)]))) - 1
    assert took.new_tokens == len(generation.token_ids) + 1 and took.stopped_by == "end"
    assert 0 < took.prefill_ms < took.first_token_ms and took.vision_ms > 0 and took.per_token_ms > 0
    assert took.peak_memory_bytes > 2**24 and took.memory_meter


def test_cancel_ends_before_the_next_token(session: Session, picture: Path) -> None:
    generation = session.generate("describe the image.", [picture])
    next(generation)
    generation.cancel()
    rest = list(generation)
    assert generation.statistics.stopped_by == "cancel"
    assert len(generation.token_ids) <= 2 and len(rest) <= 1


def test_stop_texts_end_the_answer_and_are_not_part_of_it(session: Session, picture: Path) -> None:
    whole = session.generate("describe the image.", [picture]).finish()
    stop = whole[len(whole) // 2:][:5]
    generation = session.generate("describe the image.", [picture], stop=[stop])
    assert generation.finish() == whole[:whole.index(stop)]
    assert generation.statistics.stopped_by == "stop"


def test_sampling_is_repeatable_under_a_seed_and_varies_without(session: Session, picture: Path) -> None:
    def sample(seed: int) -> str:
        return session.generate("describe the image.", [picture], temperature=3.0, seed=seed, max_new_tokens=20).finish()
    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_length_is_kept_to(session: Session, picture: Path) -> None:
    generation = session.generate("describe the image.", [picture], max_new_tokens=3)
    generation.finish()
    assert len(generation.token_ids) == 3 and generation.statistics.stopped_by == "length"


def test_a_prompt_may_fill_the_window_but_not_exceed_it(demo: Path) -> None:
    session = Session(Bundle.open(demo), plan="full", backend="null")
    window = session.plan.cache_rows[0]
    prompt = "the " * 3000
    ids = session.text.encode(prompt)
    fits = session.text.decode(ids[:window - 1])
    assert len(session.text.encode(fits)) == window - 1
    generation = session.generate(fits, raw=True)
    generation.finish()
    assert generation.statistics.new_tokens == 1 and generation.statistics.stopped_by == "length"
    with pytest.raises(InputError, match=f"window of {window} rows"):
        session.generate(session.text.decode(ids[:window]), raw=True)


def test_pruned_places_count_as_positions_under_keep(demo: Path, picture: Path) -> None:
    session = Session(Bundle.open(demo), plan="cls-64", backend="null")
    rows, positions = session.plan.cache_rows[0], session.bundle.manifest.decoder.context
    assert positions - rows == 576 - 64
    question = "the " * 500  # with 3 x 64 rows it would fit, with 3 x 576 positions it does not
    assert 2 * len(session.text.encode(question)) < rows
    with pytest.raises(InputError, match=f"window of {rows} rows and {positions} positions"):
        session.generate([user(question, images=3)], [picture] * 3)
    session.generate([user(question, images=1)], [picture])


def test_null_backend_runs_the_same_loop(demo: Path, picture: Path) -> None:
    session = Session(Bundle.open(demo), plan="dart-128", backend="null")
    generation = session.generate("describe the image.", [picture], max_new_tokens=5)
    generation.finish()
    first = generation.statistics.prompt_rows
    vocabulary = session.bundle.manifest.embeddings.shape[0]
    assert generation.token_ids == [(first + n) % vocabulary for n in range(len(generation.token_ids))], "each step had one row more in the cache"


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_texts_cut_at_the_first_one_however_the_text_is_split(pieces: list[str], stops: list[str]) -> None:
    stopper, shown = StopTexts(stops), ""
    for piece in pieces:
        shown += stopper.push(piece)
        if stopper.met:
            break
    else:
        shown += stopper.finish("")
    # the oracle: grow the text piece by piece, and cut at the earliest stop text that it has by then
    text, cut = "", None
    for piece in pieces:
        text += piece
        if ends := [at for s in stops if (at := text.find(s)) >= 0]:
            cut = min(ends)
            break
    assert shown == (text if cut is None else text[:cut])


@given(st.lists(st.sampled_from([5, 6, 7, 9]), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_rows_are_where_the_policy_puts_them(ids: list[int], keep: int, compact: bool) -> None:
    image_id, total = 9, 6
    table = np.arange(10, dtype=np.float32)[:, None].repeat(2, 1)
    images = [VisualTokens(str(n), np.full((keep, 2), 100 + n, np.float32), np.arange(keep, dtype=np.int64) + 1) for n in range(ids.count(image_id))]
    layout = Layout((Run(0, total, keep),), np.arange(total)[None], compact, 0, "")
    rows = lay_out(ids, image_id, images, lambda some: table[list(some)], layout)
    expected, position, seen = [], 0, 0
    for token in ids:  # one row at a time
        if token == image_id:
            expected += [(100 + seen, position + (n if compact else n + 1)) for n in range(keep)]
            position += keep if compact else total
            seen += 1
        else:
            expected.append((token, position))
            position += 1
    assert list(zip(rows.embeddings[:, 0].astype(int), rows.positions[0])) == expected
    assert rows.next_position == position and len(rows.sources) == len(expected)


def test_a_knob_without_effect_is_refused(demo: Path) -> None:
    with pytest.raises(InputError, match="--threads 2 has no effect on the null backend"):
        Session(Bundle.open(demo), backend="null", threads=2)


def test_a_prompt_taken_in_parts_says_what_it_says_whole(demo: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, found = [10, 20, 30, 40, 50], []
    for rows, logits in ((10**6, 16), (7, 16), (256, 2), (256, 1)):
        monkeypatch.setattr(OnnxRuntimeBackend, "prefill_rows", rows)
        monkeypatch.setattr(OnnxRuntimeBackend, "logit_rows", logits)
        found.append(Session(Bundle.open(demo), plan="full").score("describe the image.", [picture], answer))
    assert all(len(one) == 6 and np.abs(one - found[0]).max() < 1e-4 for one in found)
