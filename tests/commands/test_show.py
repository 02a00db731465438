"""What `edgecomp show` draws is what the plan keeps, where the model saw it."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecomp.canvas import cells, pictures, views
from edgecomp.cli import main
from edgecomp.show import CAPTION, MARGIN, Panel, beside, steps_of
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.manifest import Manifest, TileInfo

GRID = 24


def shown(demo: Path, picture: Path, *options: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["show", str(demo), "--image", str(picture), *map(str, options)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.mark.parametrize("plan", ["dart-64", "cls-128", "full"])
def test_the_raster_is_what_is_kept(plan: str, demo: Path, scenes: Path) -> None:
    picture = scenes / "images" / "scene-03.jpg"
    label, *lines = shown(demo, picture, "--plan", plan, "--ascii").splitlines()
    kept = set(Session(Bundle.open(demo), plan=plan).visual_tokens(picture).kept.tolist())
    assert [line.split(" ") for line in lines] == [["#" if r * GRID + c in kept else "." for c in range(GRID)] for r in range(GRID)]
    assert label.startswith(f"{plan}: ") and label.endswith(f", {len(kept)} of 576")


def drawn(demo: Path, picture: Path, plan: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The drawn panel below its caption, and the picture as the model sees it, both [24, 24, cell, cell, 3]."""
    shown(demo, picture, "--plan", plan, "-o", folder / "kept.png")
    sheet = np.asarray(Image.open(folder / "kept.png").convert("RGB"))
    seen = images.fit(images.load(picture), Bundle.open(demo).manifest.image)
    assert seen.size == (336, 336)
    found = sheet[MARGIN + CAPTION:-MARGIN, MARGIN:-MARGIN]
    expected = np.asarray(seen.resize((672, 672), Image.Resampling.NEAREST))
    assert found.shape == expected.shape == (672, 672, 3)
    return tuple(array.reshape(GRID, 28, GRID, 28, 3).transpose(0, 2, 1, 3, 4) for array in (found, expected))  # type: ignore[return-value]


def test_on_the_picture_kept_tokens_are_clear_and_the_others_dim(demo: Path, scenes: Path, tmp_path: Path) -> None:
    picture = scenes / "images" / "scene-03.jpg"
    found, seen = drawn(demo, picture, "dart-64", tmp_path)
    kept = Session(Bundle.open(demo), plan="dart-64").visual_tokens(picture).kept
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # a line runs along the edges of what is kept
    clear = (found[inside] == seen[inside]).all(axis=(2, 3, 4))
    assert np.flatnonzero(clear.reshape(-1)).tolist() == kept.tolist()
    bright = seen.mean(axis=(2, 3, 4)) > 100
    darker = found[inside].mean(axis=(2, 3, 4)) < 0.6 * seen[inside].mean(axis=(2, 3, 4))
    assert (darker == ~clear)[bright].all() and bright.mean() > 0.8


def test_nothing_hides_a_picture_that_is_kept_whole(demo: Path, scenes: Path, tmp_path: Path) -> None:
    found, seen = drawn(demo, scenes / "images" / "scene-00.jpg", "full", tmp_path)
    assert np.array_equal(found, seen)


def test_pooled_tokens_are_drawn_as_their_cells(demo: Path, scenes: Path, tmp_path: Path) -> None:
    found, seen = drawn(demo, scenes / "images" / "scene-00.jpg", "pool-64", tmp_path)  # 8x8 cells of 3x3 tokens
    cut = [array.transpose(0, 2, 1, 3, 4).reshape(8, 84, 8, 84, 3).transpose(0, 2, 1, 3, 4) for array in (found, seen)]
    assert np.array_equal(*(array[:, :, 1:-1, 1:-1] for array in cut))
    edges = [np.concatenate([array[:, :, [0, -1]].reshape(-1), array[:, :, :, [0, -1]].reshape(-1)]) for array in cut]
    assert (edges[0] >= edges[1]).all() and (edges[0] > edges[1]).mean() > 0.9  # a light line around each


def test_a_panel_a_step_each_of_what_the_last_one_left(demo: Path, scenes: Path, tmp_path: Path) -> None:
    """144 cells of 2x2 tokens, of which the decoder drops more and more: whole cells are clear or dim."""
    picture, steps = scenes / "images" / "scene-03.jpg", ("pool:projector:144", "fastv:decoder:2:64", "fastv:decoder:3:16")
    made = CliRunner().invoke(main, ["compress", str(demo), "-o", str(tmp_path / "b"), *(word for step in steps for word in ("--step", step))])
    assert made.exit_code == 0, made.output
    plan = next(name for name, plan in Bundle.open(tmp_path / "b").manifest.plans.items() if len(plan.steps) == 3)
    session = Session(Bundle.open(tmp_path / "b"), plan=plan)
    expected = [kept.tolist() for kept in session.kept(picture, "what number is written?").values()]
    assert [len(kept) for kept in expected] == [144, 64, 16] and set(expected[0]) > set(expected[1]) > set(expected[2])
    found = steps_of(session, str(picture), "what number is written?")
    assert [panel.kept.tolist() for panel in found] == expected
    assert [panel.label.partition(": ")[2] for panel in found] == [
        "pool at projector, 144 of 576", "fastv at decoder:2, 64 of 576", "fastv at decoder:3, 16 of 576"]
    text = shown(tmp_path / "b", picture, "--plan", plan, "--prompt", "what number is written?", "--ascii", "-o", tmp_path / "kept.png")
    assert [block.count("#") - block.count("each #") for block in text.split("\n\n")] == [144, 64, 16]
    sheet = np.asarray(Image.open(tmp_path / "kept.png").convert("RGB"))[MARGIN + CAPTION:-MARGIN, MARGIN:]
    seen = np.asarray(images.fit(images.load(picture), session.bundle.manifest.image).resize((672, 672), Image.Resampling.NEAREST))
    for number, kept in enumerate(expected):
        panel = sheet[:, number * (672 + MARGIN):number * (672 + MARGIN) + 672]
        same = (panel == seen).all(axis=2).reshape(12, 56, 12, 56)[:, 1:-1, :, 1:-1].all(axis=(1, 3))
        assert {(r, c) for r, c in np.argwhere(same)} == {(k // GRID // 2, k % GRID // 2) for k in kept}


def test_both_at_once_and_the_default_plan(demo: Path, scenes: Path, tmp_path: Path) -> None:
    text = shown(demo, scenes / "images" / "scene-03.jpg", "--ascii", "-o", tmp_path / "kept.png")
    plan = Bundle.open(demo).manifest.default_plan
    assert text.startswith(f"{plan}: ") and text.count("#") == Bundle.open(demo).manifest.plans[plan].visual_tokens
    assert (tmp_path / "kept.png").is_file()


def test_a_step_has_a_label_and_its_places(demo: Path, scenes: Path) -> None:
    session = Session(Bundle.open(demo), plan="stride-64")
    panel, = steps_of(session, str(scenes / "images" / "scene-03.jpg"), "x")
    assert panel.label == "stride-64: stride at projector, 64 of 576" and panel.pooled is None
    assert panel.kept.tolist() == session.visual_tokens(scenes / "images" / "scene-03.jpg").kept.tolist()


def test_steps_stand_side_by_side() -> None:
    sheet = beside([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 5), "blue")])
    assert sheet.size == (10 + 30 + 3 * MARGIN, 20 + 2 * MARGIN)
    assert sheet.getpixel((MARGIN, MARGIN + 19)) == (255, 0, 0) and sheet.getpixel((2 * MARGIN + 10, MARGIN)) == (0, 0, 255)
    assert sheet.getpixel((2 * MARGIN + 10, MARGIN + 5)) == (255, 255, 255)


@pytest.mark.parametrize(("options", "telling"), [
    ([], "nowhere to draw: give -o PICTURE.png, or --ascii"), (["-o", "kept.jpg"], "kept.jpg does not end in .png"),
    (["-o", "no/such/kept.png"], "no/such is not a folder")])
def test_usage(options: list[str], telling: str, scenes: Path) -> None:
    assert telling in shown(Path("b"), scenes / "images" / "scene-03.jpg", *options, code=2)


def test_a_picture_or_plan_that_there_is_not(demo: Path, scenes: Path, tmp_path: Path) -> None:
    assert "did you mean 'dart-64'?" in shown(demo, scenes / "images" / "scene-03.jpg", "--plan", "dart-65", "--ascii", code=1)
    assert "nothing.jpg" in shown(demo, tmp_path / "nothing.jpg", "-o", tmp_path / "kept.png", code=1)
    assert not (tmp_path / "kept.png").exists()


# pictures of several tiles

SIDE = 4  # tokens of a tile's side
PATCH = 3  # pixels of a token's side


def tiled(rows: int, columns: int, overview: str, raster: bool) -> Manifest:
    """Tiles of SIDE x SIDE tokens, one behind another or in one raster with newlines."""
    count, start = rows * columns, SIDE * SIDE if overview == "first" else 0
    if raster:
        stride = columns * SIDE + 1
        tiles = [TileInfo(start + r * SIDE * stride + c * SIDE, SIDE, SIDE, stride) for r in range(rows) for c in range(columns)]
    else:
        tiles = [TileInfo(start + n * SIDE * SIDE, SIDE, SIDE, SIDE) for n in range(count)]
    end = max(t.start + (t.rows - 1) * t.stride + t.columns for t in tiles)
    whole = [TileInfo(0 if start else end, SIDE, SIDE, SIDE)]
    tiles = (whole if start else []) + tiles + (whole if overview.startswith("last") else [])
    manifest = manifest_of(tiles, max(t.start + t.rows * t.stride for t in tiles), cut=(rows, columns), overview=overview)
    return dataclasses.replace(manifest, image=dataclasses.replace(manifest.image, size=(SIDE * PATCH, SIDE * PATCH)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["", "first", "last", "last of canvas"]), st.booleans(), st.integers(0, 9))
def test_a_token_is_drawn_over_the_pixels_of_its_tile(rows: int, columns: int, overview: str, raster: bool, seed: int) -> None:
    manifest = tiled(rows, columns, overview, raster)
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    seen, parts = pictures(picture, manifest.image), views(manifest)
    assert len(seen) == len(parts) == 1 + bool(overview) and [p.name for p in parts] == ["picture", "overview"][:len(parts)]
    met: set[int] = set()
    for tile, pixels in zip(manifest.vision.tiles, images.tiles(picture, manifest.image)):
        for r in range(tile.rows):
            for c in range(tile.columns):
                token = tile.start + r * tile.stride + c
                (view, below), = [(v, b) for v, b in zip(parts, seen) if token in v.places]
                down, across = divmod(view.places[token], view.grid[1])
                assert np.array_equal(patch(pixels, r, c), patch(below, down, across))
                met.add(token)
    assert sum(len(view.places) for view in parts) == len(met)
    for view in parts:
        assert sorted(view.places.values()) == list(range(view.grid[0] * view.grid[1]))


def patch(picture: Image.Image, row: int, column: int) -> np.ndarray:
    return np.asarray(picture)[row * PATCH:(row + 1) * PATCH, column * PATCH:(column + 1) * PATCH]


def test_what_is_black_around_a_picture_is_not_drawn_on() -> None:
    image = dataclasses.replace(tiled(2, 2, "first", True).image, box=(12, 24))
    canvas, overview = pictures(Image.new("RGB", (200, 100), "white"), image)
    assert canvas.size == (24, 12) and np.asarray(canvas).min() == 255 and overview.size == (12, 12)


@pytest.mark.parametrize(("kept", "pooled", "expected"), [
    ([1, 6], False, [(1, 0, 1, 1), (2, 1, 1, 1)]), ([1, 3, 9, 11], True, [(0, 0, 2, 2), (2, 0, 2, 2), (0, 2, 2, 2), (2, 2, 2, 2)]),
    ([0, 5, 10], True, [(0, 0, 1, 1), (1, 1, 1, 1), (2, 2, 1, 1)])])
def test_cells(kept: Sequence[int], pooled: bool, expected: list[tuple[float, ...]]) -> None:
    assert cells(kept, (4, 4), pooled) == expected


def test_a_panel_is_of_tokens() -> None:
    view, = views(tiled(1, 1, "", False))
    assert view.kept(Panel("x", np.array([3, 5, 99])).kept) == [3, 5]
