"""What a plan keeps of a picture, to look at: drawn on it, or as a raster of characters."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgecomp.canvas import View, cells, pictures, views

if TYPE_CHECKING:
    from PIL import Image

    from edgecomp_runtime import Session

LONGEST = 448  # pixels of a panel's longer edge at least
MARGIN, CAPTION = 8, 24
PAPER, INK = (255, 255, 255), (20, 20, 28)
DIM = 0.35  # of the brightness of what is dropped
LINE = (255, 255, 255, 110)  # around what went on, so that it shows on black, too


@dataclass(frozen=True)
class Panel:
    """One step of a plan. kept: the numbers of the tokens that went on, among the unpruned. pooled: the same of all that were pooled
    here or before, each the centre of a cell."""
    label: str
    kept: NDArray[np.int64]
    pooled: NDArray[np.int64] | None = None


def steps_of(session: Session, image: str, prompt: str) -> list[Panel]:
    """What each step of a session's plan keeps of a picture; steps inside the vision graph are one.

    Of a merged token no more than its place is known, except where it is the mean of a cell.
    """
    plan, whole = session.plan, session.bundle.manifest.vision.tokens
    inside = len(plan.steps) - len(plan.cuts)  # steps before the decoder, which come first
    groups = [plan.steps[:inside], *((step,) for step in plan.steps[inside:])]
    found: list[Panel] = []
    pooled: NDArray[np.int64] | None = None
    for group, kept in zip(groups, session.kept(image, prompt).values()):
        if group or not plan.cuts:  # what is whole yet is not drawn where something is cut later
            label = ", ".join(f"{step.method} at {step.site}" for step in group) or "all"
            pooled = kept if group and group[-1].method == "pool" else pooled
            found.append(Panel(f"{session.plan_name}: {label}, {len(kept)} of {whole}", kept, pooled))
    return found


def draw(session: Session, image: str, prompt: str) -> Image.Image:
    """The picture as the model sees it, once for each step: what went on is clear, what was dropped is dim, pooled cells are outlined.
    An overview is below."""
    from edgecomp_runtime.images import load
    manifest = session.bundle.manifest
    seen = list(zip(pictures(load(image), manifest.image), views(manifest)))
    return beside([_captioned(panel.label, [_masked(picture, view, panel) for picture, view in seen]) for panel in steps_of(session, image, prompt)])


def rasters(session: Session, image: str, prompt: str) -> str:
    """The same as text, a raster for each view of each step: # went on, . was dropped."""
    return "\n\n".join("\n".join([panel.label + (", each # for a cell" if panel.pooled is not None else ""), *_raster(view, panel)])
                       for panel in steps_of(session, image, prompt) for view in views(session.bundle.manifest))


def beside(drawn: list[Image.Image]) -> Image.Image:
    """Pictures from left to right on one."""
    from PIL import Image
    sheet = Image.new("RGB", (sum(d.width + MARGIN for d in drawn) + MARGIN, max(d.height for d in drawn) + 2 * MARGIN), PAPER)
    left = MARGIN
    for one in drawn:
        sheet.paste(one, (left, MARGIN))
        left += one.width + MARGIN
    return sheet


def _captioned(label: str, drawn: list[Image.Image]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(14)
    wide = max(math.ceil(font.getlength(label)), *(d.width for d in drawn))
    sheet = Image.new("RGB", (wide, CAPTION + sum(d.height + MARGIN for d in drawn) - MARGIN), PAPER)
    ImageDraw.Draw(sheet).text((0, 2), label, INK, font)
    top = CAPTION
    for one in drawn:
        sheet.paste(one, (0, top))
        top += one.height + MARGIN
    return sheet


def _masked(picture: Image.Image, view: View, panel: Panel) -> Image.Image:
    from PIL import Image, ImageDraw
    scale = max(1, math.ceil(LONGEST / max(picture.size)))
    clear = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    dim = Image.blend(Image.new("RGB", clear.size, INK), clear.convert("L").convert("RGB"), DIM)
    mask = Image.new("L", clear.size)
    kept = view.kept(panel.kept)
    centres = kept if panel.pooled is None else sorted(view.kept(panel.pooled))
    spans = [span for place, span in zip(centres, cells(centres, view.grid, panel.pooled is not None)) if place in kept]
    boxes = list(_boxes(spans, view.grid, clear.size))
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, 255)
    found = Image.composite(clear, dim, mask)
    if len(boxes) < len(view.places):  # lines around everything would only hide the picture
        for box in boxes:
            ImageDraw.Draw(found, "RGBA").rectangle(box, outline=LINE)
    return found


def _boxes(spans: list[tuple[float, float, float, float]], grid: tuple[int, int], size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Pixels (left, top, right, bottom, the last two included) of spans of a grid."""
    down, across = size[1] / grid[0], size[0] / grid[1]
    for x, y, wide, high in spans:
        yield round(x * across), round(y * down), round((x + wide) * across) - 1, round((y + high) * down) - 1


def _raster(view: View, panel: Panel) -> list[str]:
    rows, columns = view.grid
    kept = set(view.kept(panel.kept))
    gap = " " if columns <= 40 else ""  # characters are twice as high as wide, lines may be 80 long
    lines = [gap.join("#" if row * columns + column in kept else "." for column in range(columns)) for row in range(rows)]
    return [f"{view.name}:", *lines] if view.name != "picture" else lines
