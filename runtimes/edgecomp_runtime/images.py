"""Pictures into pixels: what Hugging Face's image processors compute, without torch and within a device's memory."""
from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgecomp_runtime.errors import InputError
from edgecomp_runtime.manifest import ImageInfo

FILTER_REACH = 4  # source pixels to each side that enlarging can look at: pillow's widest filter, Lanczos, has 3
MOST_LONGEST = 4096  # pixels of an edge, in Idefics3's processor
WINDOW_ABOVE = 8  # an enlarged picture of more than so many crops is never made whole
SQUARED_BELOW = 8  # a picture that is longer than so many times its width has no square made for it, which would be huge

Box = tuple[int, int, int, int]  # left, top, right, bottom, as pillow has it


def load(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> Image.Image:
    """A picture as upright RGB, as Hugging Face's `load_image` and then an image processor's `convert_to_rgb` make it.

    EXIF orientation is applied, alpha is dropped, a colour marked as clear becomes white, and of an animation the first frame
    is taken (of an open pillow picture, the frame that it stands at). Different from Hugging Face: greyscale of 16 bits (modes
    I;16 and I) keeps its high byte, as colour of 16 bits does in both, where Hugging Face clips it to white at 255; and
    floating-point pictures are refused where it clips them. Files are read up to pillow's hard limit of pixels, without its
    warning at half of it.

    Args:
        image: a path, a pillow picture, or a camera frame as uint8 [height, width, 3] (red first) or [height, width] (grey).

    Raises:
        InputError: there is no such file, it is no picture, damaged, too large, empty, or of a kind that has no 8-bit range.
    """
    if isinstance(image, np.ndarray):
        return _from_frame(image)
    if isinstance(image, Image.Image):
        return _read(image, "the picture")
    if isinstance(image, (str, os.PathLike)):
        return _read(image, os.fspath(image))
    raise InputError(f"a picture is a path, a pillow image or a uint8 array, not {type(image).__name__}: convert it first")


def preprocess(picture: Image.Image, info: ImageInfo, dtype: str = "float32") -> np.ndarray:
    """Pixels of an RGB picture (from `load`): [3, height, width] of `info.size`, or [tiles, 3, height, width].

    What `tiles` makes of it, each `(value * rescale - mean) / std`. Equal to Hugging Face's image processors without torchvision
    (`CLIPImageProcessorPil` and so on), CLIP's and SigLIP's bit for bit. Only small pictures so long and thin that Hugging Face
    would enlarge them to more than eight crops may be off by one of 255 levels in rare pixels. `dtype` is what they are rounded to.
    """
    found = np.stack([np.asarray(tile) for tile in tiles(picture, info)])  # [tiles, height, width, 3]
    # What each of the 256 levels becomes in each channel. Hugging Face scales in float64 and normalises in float32; the same order gives
    # the same bits.
    levels = (np.arange(256) * info.rescale).astype(np.float32)[:, None]
    becomes = ((levels - np.array(info.mean, np.float32)) / np.array(info.std, np.float32)).T.astype(dtype)
    pixels = np.empty((len(found), 3, *info.size), dtype)
    for channel in range(3):
        np.take(becomes[channel], found[..., channel], out=pixels[:, channel], mode="clip")
    return pixels[0] if info.count == 1 else pixels


def tiles(picture: Image.Image, info: ImageInfo) -> list[Image.Image]:
    """The tiles that the vision tower sees, row by row, with the overview where `info.overview` says."""
    canvas, (height, width) = fit(picture, info), info.size
    rows, columns = info.tiles
    found = [canvas.crop((c * width, r * height, (c + 1) * width, (r + 1) * height)) for r in range(rows) for c in range(columns)]
    if info.overview:
        overview = (canvas if info.overview == "last of canvas" else picture).resize((width, height), info.resample)
        found.insert(0 if info.overview == "first" else len(found), overview)
    return found


def fit(picture: Image.Image, info: ImageInfo) -> Image.Image:
    """A picture on the canvas that is cut into tiles: the part of it that the model sees, at the size it sees it.

    With `info.shortest_edge` the picture is resized to it and its centre cut out, black where it is smaller than the cut. With
    `info.box` it is resized within the box, its aspect kept, and centred on black. With `info.square` it is padded to a square of
    that colour, then resized (a picture longer than eight times its width the other way round, which its edges show, if anything).
    Without, it is resized to the canvas, whatever its aspect, with `info.longest_edge` by way of that edge, as Idefics3's processor
    does.
    """
    height, width = info.canvas
    if info.box:
        return _letterbox(picture, info.box, (width, height), info.resample)
    if info.square and max(picture.size) > SQUARED_BELOW * min(picture.size):
        return _letterbox(picture, info.canvas, (width, height), info.resample, info.square)
    if info.square:
        picture = _squared(picture, info.square)
    if info.longest_edge:
        picture = picture.resize(_longest(picture.size, info.longest_edge), info.resample)
    if info.shortest_edge is None:
        return picture.resize((width, height), info.resample)
    resized = _resized_size(picture.size, info.shortest_edge)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    box = (left, top, left + width, top + height)
    # Shrinking needs no window: what it makes is smaller than the picture, which is in memory already.
    if resized[0] > picture.width and resized[0] * resized[1] > WINDOW_ABOVE * width * height:
        return _enlarge_window(picture, resized, box, info.resample)
    return picture.resize(resized, info.resample).crop(box)  # crop fills with zeros beyond the edges


def _letterbox(picture: Image.Image, box: tuple[int, int], size: tuple[int, int], resample: int,
               colour: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """LLaVA-NeXT's fitting: within `box` (height, width), rounded up, in the middle of black of `size` (width, height)."""
    scale = min(box[1] / picture.width, box[0] / picture.height)
    inner = (min(math.ceil(picture.width * scale), box[1]), min(math.ceil(picture.height * scale), box[0]))
    canvas = Image.new("RGB", size, colour)
    canvas.paste(picture.resize(inner, resample), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas


def _squared(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A picture in the middle of the square of its longer edge, as LLaVA-OneVision's processor has it."""
    edge = max(picture.size)
    square = Image.new("RGB", (edge, edge), colour)
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square


def _longest(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Width and height after the longer edge has become `edge` and the other one even, and then at most 4096, as Idefics3's
    processor has it."""
    width, height = _scaled(size, edge)
    if size[0] >= size[1]:
        height += height % 2
    else:
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > MOST_LONGEST:
        width, height = _scaled((width, height), MOST_LONGEST)
    return max(width, 1), max(height, 1)


def _scaled(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Width and height, rounded down, after the longer edge has become `edge`."""
    aspect = size[0] / size[1]
    return (edge, int(edge / aspect)) if size[0] >= size[1] else (int(edge * aspect), edge)


def _from_frame(frame: np.ndarray) -> Image.Image:
    if frame.dtype != np.uint8 or not (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)):
        raise InputError(f"a camera frame is uint8 [height, width, 3] (RGB) or [height, width] (grey), "
                         f"not {frame.dtype} {list(frame.shape)}: convert it first")
    height, width = frame.shape[:2]
    _check_size((width, height), "the camera frame")
    return Image.fromarray(frame).convert("RGB")


def _read(source: str | os.PathLike[str] | Image.Image, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of half the pixel limit, of odd metadata: a picture that loads is good enough
        try:
            if isinstance(source, Image.Image):
                return _upright_rgb(source, name)
            with Image.open(source) as picture:
                return _upright_rgb(picture, name)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{name}: no such file; give the path of a picture on this device") from None
        except UnidentifiedImageError:
            raise InputError(f"{name} is not a picture of a known format: convert it to PNG or JPEG") from None
        except (Image.DecompressionBombError, MemoryError) as error:
            raise InputError(f"{name} is too large ({str(error) or 'out of memory'}): scale it down first") from None
        except Exception as error:  # pillow's readers raise whatever their parsers run into, struct.error among them
            if isinstance(error, OSError) and error.strerror:
                raise InputError(f"{name} cannot be read ({error.strerror}): check the path and its permissions") from None
            raise InputError(f"{name} is damaged or cut short ({error}): copy or save it again") from None


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    _check_size(picture.size, name)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise InputError(f"{name} is a floating-point picture, whose range is unknown: save it with 8 or 16 bits")
    return _high_byte(picture, name) if picture.mode.startswith("I") else _clear_to_white(picture.convert("RGB"))


def _clear_to_white(picture: Image.Image) -> Image.Image:
    """White for the one colour that PNG and GIF may mark as clear: the mark outlives `load_image`, and processors act on it."""
    if picture.info.get("transparency") is None:
        return picture
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def _high_byte(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture)  # uint16 or, in older pillow and for 32-bit files, int32
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{name} is greyscale from {values.min()} to {values.max()}, and 0 to 65535 can be read: "
                         "save it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _check_size(size: tuple[int, int], name: str) -> None:
    if 0 in size:
        raise InputError(f"{name} is empty ({size[0]} x {size[1]} pixels): give one of at least 1 x 1")


def _resized_size(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Width and height after the shorter edge of a picture of `size` has become `shortest_edge`."""
    width, height = size
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


@dataclass(frozen=True)
class _Span:
    """One axis of a window: pixels first..last of the resized picture come from low..high of the source cut at cut_first."""
    first: int
    last: int
    low: float
    high: float
    cut_first: int
    cut_last: int


def _enlarge_window(picture: Image.Image, resized: tuple[int, int], box: Box, resample: int) -> Image.Image:
    """`picture.resize(resized).crop(box)` for a larger size, without the whole resized picture.

    A panorama of 20000 x 20 becomes 336000 x 336 on the way to its 336 x 336 centre: 450 MB, on a device that may have none
    to spare; a picture of 1 x 1000000 could not be resized at all.
    """
    x, y = _span(picture.width, resized[0], box[0], box[2]), _span(picture.height, resized[1], box[1], box[3])
    # pillow holds the edges of `box` in float32, too coarse at 20000: cut the source first, so that they are small numbers
    source = picture.crop((x.cut_first, y.cut_first, x.cut_last, y.cut_last))
    # pillow 13 chooses by the sizes which axis goes first, and its 8-bit values between the two depend on that. Enlarging goes
    # by rows first in every version; a window might not, so the order is spelled out.
    width, height = x.last - x.first, y.last - y.first
    rows = source.resize((width, source.height), resample, box=(x.low, 0, x.high, source.height))
    window = rows.resize((width, height), resample, box=(0, y.low, width, y.high))
    return window.crop((box[0] - x.first, box[1] - y.first, box[2] - x.first, box[3] - y.first))


def _span(size: int, resized: int, first: int, last: int) -> _Span:
    first, last = max(first, 0), min(last, resized)
    low, high = size * first / resized, size * last / resized
    cut_first, cut_last = max(math.floor(low) - FILTER_REACH, 0), min(math.ceil(high) + FILTER_REACH, size)
    return _Span(first, last, low - cut_first, high - cut_first, cut_first, cut_last)
