"""Ranges of what enters products, and the pictures to take them from: against plain loops over the numbers themselves."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecomp.quantize.calibrate import best_range, histogram, size
from edgecomp.quantize.subset import Calibration, cover
from edgecomp_runtime.errors import InputError, UnknownNameError


def squared_error(values: NDArray[np.float64], top: float) -> float:
    """Of numbers that are rounded to int8 with a range."""
    step = top / 127
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).sum())


@pytest.mark.parametrize("kind", ["normal", "outliers", "positive", "heavy", "rare", "one"])
def test_the_range_rounds_about_as_well_as_any_other(kind: str) -> None:
    """The best of many that are tried on the numbers themselves is at most 2 % better; the largest number is much worse where it is rare."""
    rng = np.random.default_rng(0)
    values = {"normal": rng.normal(size=20_000), "outliers": np.concatenate([rng.normal(size=20_000), [900.0, -950.0]]),
              "positive": np.maximum(rng.normal(size=20_000), 0), "heavy": rng.standard_t(3, 20_000),
              "rare": np.append(rng.normal(size=300_000), 8.0), "one": np.array([3.0])}[kind]
    found = best_range(histogram(values))
    tried = min(squared_error(values, float(np.abs(values).max()) * share) for share in np.linspace(0.01, 1.02, 200))
    assert squared_error(values, found) <= 1.02 * tried + 1e-3
    if kind == "rare":
        assert squared_error(values, found) < 0.6 * squared_error(values, float(np.abs(values).max()))
    if kind == "outliers":
        assert found > 800  # what is so far beyond the rest would be missed more than the rest gains


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2.0**99, 2.0**99, width=32), min_size=1, max_size=40), st.sampled_from([np.float32, np.float16]))
def test_every_number_is_counted_near_its_size(values: list[float], dtype: type) -> None:
    array = np.clip(np.array(values), -6e4, 6e4).astype(dtype)
    counts = histogram(array)
    places = np.repeat(np.arange(len(counts)), counts)
    assert len(places) == len(values)
    np.testing.assert_allclose(size(places), np.sort(np.abs(array.astype(np.float64))), rtol=2**-8, atol=1e-38)


def by_loops(largest: dict[str, NDArray[np.float32]], count: int) -> list[int]:
    """The rule of `cover` in words: channel by channel, picture by picture."""
    pictures = len(next(iter(largest.values())))
    channels = [[float(rows[p, c]) / float(rows.max()) for p in range(pictures)] for rows in largest.values() for c in range(rows.shape[1])]
    open_, taken = [c for c in channels if max(c) >= 0.5], list[int]()
    while open_ and len(taken) < count:
        gains = [sum(max(c) for c in open_ if c[p] >= 0.9 * max(c)) for p in range(pictures)]
        taken.append(max(range(pictures), key=lambda p: (round(gains[p], 5), -p)))
        open_ = [c for c in open_ if c[taken[-1]] < 0.9 * max(c)]
    while len(taken) < count:
        def apart(p: int) -> float:
            return min(sum((c[p] - c[q]) ** 2 for c in channels) for q in taken)
        taken.append(max((p for p in range(pictures) if p not in taken), key=lambda p: (round(apart(p), 5), -p)))
    return taken


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 3, 9, 14])
def test_cover_is_the_greedy_rule(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    largest = {name: np.abs(rng.standard_t(3, (14, width))).astype(np.float32) for name, width in (("a", 5), ("b", 8))}
    assert cover(largest, count) == by_loops(largest, count)


def test_cover_takes_the_picture_in_which_a_channel_stands_out() -> None:
    largest = np.ones((20, 6), np.float32)
    largest[7, 2] = largest[13, 4] = 50
    assert sorted(cover({"x": largest}, 2)) == [7, 13]


def test_copies_of_a_picture_fill_what_is_asked_for() -> None:
    assert sorted(cover({"x": np.ones((4, 3), np.float32), "never seen": np.zeros((4, 2), np.float32)}, 4)) == [0, 1, 2, 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 files that are named like pictures, in two folders, and others."""
    (tmp_path / "more").mkdir()
    for n in range(40):
        (tmp_path / ("more" if n % 2 else "") / f"{n:02d}.{'JPG' if n % 3 else 'png'}").touch()
    for name in ("notes.txt", "more/labels.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_pictures_are_drawn_by_the_seed(folder: Path) -> None:
    drawn = [Calibration(folder, 8, "random", seed).candidates() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(one)) == 8 and one == sorted(one) for one in drawn)
    assert len(set(Calibration(folder, 40).candidates())) == 40
    assert len(Calibration(folder, 2, "cover").candidates()) == 32 and len(Calibration(folder, 8, "cover").candidates()) == 40


@pytest.mark.parametrize(("given", "error", "message"), [
    (Calibration(Path("pictures"), 41), InputError, "has 40 pictures, and 41 are asked for: give more, or ask for 40 with --calibration-images 40"),
    (Calibration(Path("pictures/none")), InputError, "none has no pictures to calibrate on (.jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff): "),
    (Calibration(Path("pictures/away")), InputError, "away: no such folder of pictures to calibrate on"),
    (Calibration(Path("pictures/notes.txt")), InputError, "notes.txt: no such folder of pictures to calibrate on"),
    (Calibration(Path("pictures"), 8, "covers"), UnknownNameError, "unknown choice of calibration pictures 'covers'; did you mean 'cover'?"),
])
def test_what_cannot_serve_is_said(folder: Path, given: Calibration, error: type[Exception], message: str) -> None:
    (folder / "none").mkdir()
    (folder / "none" / "readme.md").touch()
    with pytest.raises(error) as said:
        Calibration(folder / given.folder.relative_to("pictures"), given.images, given.choice, given.seed).candidates()
    assert message in str(said.value)
