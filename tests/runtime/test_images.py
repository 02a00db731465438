"""Pictures against transformers' image processors: real photographs, odd files, broken files."""
from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from edgecomp_runtime import images
from edgecomp_runtime.errors import InputError
from edgecomp_runtime.manifest import ImageInfo

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageInfo((336, 336), 336, 3, 1 / 255, CLIP_MEAN, CLIP_STD)
SIGLIP = ImageInfo((384, 384), None, 3, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ONE_LEVEL = 1.001 / 255 / min(CLIP_STD)

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = [*(SKIMAGE / name for name in (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "chessboard_GRAY.png", "chessboard_RGB.png",
    "clock_motion.png", "coffee.png", "coins.png", "color.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "logo.png",
    "microaneurysms.png", "moon.png", "motorcycle_left.png", "multipage.tif", "no_time_for_that_tiny.gif", "page.png",
    "phantom.png", "retina.jpg", "rocket.jpg", "text.png")), SKLEARN / "china.jpg", SKLEARN / "flower.jpg"]


def hf_clip(picture: Image.Image, info: ImageInfo = CLIP) -> np.ndarray:
    processor = CLIPImageProcessorPil(size={"shortest_edge": info.shortest_edge}, resample=info.resample,
                                      crop_size={"height": info.size[0], "width": info.size[1]},
                                      rescale_factor=info.rescale, image_mean=list(info.mean), image_std=list(info.std))
    return np.asarray(processor(picture)["pixel_values"][0])


def hf_siglip(picture: Image.Image, info: ImageInfo = SIGLIP) -> np.ndarray:
    processor = SiglipImageProcessorPil(size={"height": info.size[0], "width": info.size[1]}, resample=info.resample,
                                        rescale_factor=info.rescale, image_mean=list(info.mean), image_std=list(info.std))
    return np.asarray(processor(picture)["pixel_values"][0])


def noise(width: int, height: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """Noise [height, width, bands], where a shift by a fraction of a pixel shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)


def picture_of(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width, height))


def png(values: np.ndarray, depth: int, colour: int, size: tuple[int, int] | None = None) -> bytes:
    """A PNG by hand, of depths that pillow does not write. `size` is what its header claims."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2" if depth == 16 else np.uint8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(size or (width, height)), depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def assert_as_in_transformers(path: Path) -> None:
    expected = load_image(str(path))
    loaded = images.load(path)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), convert_to_rgb(expected, return_numpy=True))
    pixels = images.preprocess(loaded, CLIP)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 336, 336)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, hf_clip(expected))


# Pictures that can be used

def test_half_precision_is_the_same_rounded() -> None:
    loaded = images.load(PHOTOGRAPHS[0])
    pixels = images.preprocess(loaded, CLIP, "float16")
    assert pixels.dtype == np.float16 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, images.preprocess(loaded, CLIP).astype(np.float16))


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_photographs_are_as_in_transformers(path: Path) -> None:
    assert_as_in_transformers(path)


@pytest.mark.parametrize("path", PHOTOGRAPHS[::4], ids=lambda path: path.name)
def test_resizing_to_the_size_itself_is_as_in_siglip(path: Path) -> None:
    np.testing.assert_array_equal(images.preprocess(images.load(path), SIGLIP), hf_siglip(load_image(str(path))))


def odd_files() -> dict[str, tuple[str, Image.Image, dict[str, object]]]:
    """Name -> suffix, picture and how to save it."""
    colour, alpha, grey = picture_of(61, 43), Image.fromarray(noise(50, 30, 4)), Image.fromarray(noise(41, 57)[..., 0])
    frames = [Image.fromarray(noise(40, 30, 3, seed)) for seed in range(3)]
    palette = colour.quantize(16)
    return {
        "one pixel": (".png", picture_of(1, 1), {}),
        "two by a thousand": (".png", picture_of(2, 1000), {}),
        "a thousand by two": (".png", picture_of(1000, 2), {}),
        "odd sizes": (".png", picture_of(337, 335), {}),
        "just the crop": (".png", picture_of(336, 336), {}),
        "grey": (".png", grey, {}),
        "grey jpeg": (".jpg", grey, {}),
        "grey and alpha": (".png", Image.fromarray(noise(33, 44, 2), "LA"), {}),
        "black and white": (".png", grey.convert("1"), {}),
        "alpha": (".png", alpha, {}),
        "alpha webp": (".webp", alpha, {"lossless": True}),
        "palette": (".png", palette, {}),
        "palette with a clear colour": (".png", palette, {"transparency": 3}),
        "palette with alpha": (".png", palette, {"transparency": bytes(range(0, 256, 16))}),
        "colour with a clear colour": (".png", colour, {"transparency": colour.getpixel((0, 0))}),
        "four inks": (".jpg", colour.convert("CMYK"), {}),
        "four inks tiff": (".tif", colour.convert("CMYK"), {}),
        "brightness and colour": (".jpg", colour.convert("YCbCr"), {}),
        "lab": (".tif", colour.convert("LAB"), {}),
        "animated gif": (".gif", frames[0], {"save_all": True, "append_images": frames[1:], "duration": 50}),
        "animated webp": (".webp", frames[0], {"save_all": True, "append_images": frames[1:], "lossless": True}),
        "animated png": (".png", frames[0], {"save_all": True, "append_images": frames[1:]}),
        "progressive jpeg": (".jpg", colour, {"progressive": True, "quality": 30}),
        "bmp": (".bmp", colour, {}),
        "ppm": (".ppm", colour, {}),
        "icon": (".ico", picture_of(64, 64), {}),
    }


@pytest.mark.parametrize("name", odd_files())
def test_odd_files_are_as_in_transformers(tmp_path: Path, name: str) -> None:
    suffix, picture, options = odd_files()[name]
    path = tmp_path / f"odd{suffix}"
    picture.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers lets pillow warn of palettes with alpha
        assert_as_in_transformers(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_photographs_stand_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"turned{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture_of(60, 40).save(path, exif=exif)
    assert images.load(path).size == ((60, 40) if orientation < 5 else (40, 60))
    assert_as_in_transformers(path)


@pytest.mark.parametrize("info", [CLIP, ImageInfo((24, 40), 32, 3, 1 / 255, CLIP_MEAN, CLIP_STD),
                                  ImageInfo((50, 50), 40, 3, 1 / 127.5, (1.0, 1.0, 1.0), (1.0, 0.5, 2.0)),
                                  ImageInfo((30, 30), 30, 2, 1 / 255, CLIP_MEAN, CLIP_STD),
                                  ImageInfo((30, 30), 30, 1, 1 / 255, CLIP_MEAN, CLIP_STD)],
                         ids=["clip", "wide crop", "crop wider than the picture", "bilinear", "lanczos"])
def test_every_setting_is_followed(info: ImageInfo) -> None:
    for size in [(100, 60), (33, 90), (20, 20)]:
        np.testing.assert_array_equal(images.preprocess(picture_of(*size), info), hf_clip(picture_of(*size), info))


EDGES = st.integers(1, 120)


@settings(deadline=None, max_examples=150)
@given(width=EDGES, height=EDGES, edge=st.integers(1, 48), crop=st.tuples(st.integers(1, 48), st.integers(1, 48)))
def test_any_size_is_as_in_transformers(width: int, height: int, edge: int, crop: tuple[int, int]) -> None:
    picture, info = picture_of(width, height), ImageInfo(crop, edge, 3, 1 / 255, CLIP_MEAN, CLIP_STD)
    actual, expected = images.preprocess(picture, info), hf_clip(picture, info)
    enlarged = edge > min(width, height)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ONE_LEVEL if enlarged else 0)


@settings(deadline=None, max_examples=50)
@given(width=EDGES, height=EDGES, size=st.tuples(st.integers(1, 48), st.integers(1, 48)))
def test_any_size_is_as_in_siglip(width: int, height: int, size: tuple[int, int]) -> None:
    info = ImageInfo(size, None, 3, 1 / 255, SIGLIP.mean, SIGLIP.std)
    np.testing.assert_array_equal(images.preprocess(picture_of(width, height), info), hf_siglip(picture_of(width, height), info))


@pytest.mark.parametrize(("size", "edge", "crop"), [
    ((20000, 20), 64, (64, 64)), ((20, 20000), 64, (64, 64)), ((30001, 301), 33, (40, 40)), ((9999, 100), 24, (30, 20)),
    ((1, 5000), 17, (17, 17)), ((4001, 300), 60, (30, 31)), ((12345, 7), 9, (5, 100)), ((40000, 200), 100, (100, 100)),
])
def test_long_and_thin_pictures_are_as_in_transformers_within_a_level(
        size: tuple[int, int], edge: int, crop: tuple[int, int]) -> None:
    picture, info = picture_of(*size), ImageInfo(crop, edge, 3, 1 / 255, CLIP_MEAN, CLIP_STD)
    off = np.abs(images.preprocess(picture, info) - hf_clip(picture, info))
    assert off.max() <= ONE_LEVEL
    assert (off > 1e-5).mean() < 0.01


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_too_long_to_resize_whole_still_gives_its_middle(upright: bool) -> None:
    values = noise(1_000_000, 1)  # 336 million pixels long and 336 high, if it were resized whole
    middle = values[:, 499_980:500_020]
    whole, part = (Image.fromarray(np.ascontiguousarray(v.swapaxes(0, 1) if upright else v)) for v in (values, middle))
    np.testing.assert_allclose(images.preprocess(whole, CLIP), hf_clip(part), rtol=0, atol=ONE_LEVEL)


# 16 bits, where transformers clips

def test_grey_of_16_bits_is_seen_like_colour_of_16_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (45, 64), np.uint16)
    values[0, :2] = 0, 65535
    grey, colour, eight = tmp_path / "grey.png", tmp_path / "colour.png", tmp_path / "eight.png"
    grey.write_bytes(png(values, 16, 0))
    colour.write_bytes(png(np.stack([values] * 3, -1), 16, 2))
    eight.write_bytes(png(values // 256, 8, 0))
    loaded = np.asarray(images.load(grey))
    np.testing.assert_array_equal(loaded, np.asarray(load_image(str(colour))))
    np.testing.assert_array_equal(loaded, np.asarray(load_image(str(eight))))
    assert (np.asarray(load_image(str(grey))) == 255).mean() > 0.9  # what transformers makes of it


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_all_forms_of_16_bits_are_read(tmp_path: Path, kind: str) -> None:
    values = np.arange(0, 65536, 13, np.uint16)[:5000].reshape(50, 100)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind]
    picture = Image.frombytes(kind, (100, 50), values.astype(dtype).tobytes())
    picture.save(tmp_path / "deep.tif")
    for source in (picture, tmp_path / "deep.tif"):
        np.testing.assert_array_equal(np.asarray(images.load(source)), np.stack([values // 256] * 3, -1))


@pytest.mark.parametrize("extreme", [-1, 65536])
def test_greyscale_beyond_16_bits_is_refused(extreme: int) -> None:
    values = np.array([[0, extreme]], np.int32)
    with pytest.raises(InputError, match=f"the picture is greyscale from {values.min()} to {values.max()}, and 0 to 65535 "):
        images.load(Image.fromarray(values))


# Open pictures and camera frames

def test_an_open_picture_is_as_in_transformers_and_stays_as_it_was() -> None:
    picture = Image.fromarray(noise(30, 20, 4))
    before = picture.tobytes()
    np.testing.assert_array_equal(np.asarray(images.load(picture)), np.asarray(load_image(picture)))
    assert picture.mode == "RGBA"
    assert picture.tobytes() == before


@pytest.mark.parametrize("shape", [(40, 70, 3), (40, 70)])
def test_a_camera_frame_is_as_in_transformers(shape: tuple[int, ...]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(images.preprocess(images.load(frame), CLIP), hf_clip(Image.fromarray(frame)))


def test_a_camera_frame_can_be_a_view() -> None:
    frame = noise(64, 48)
    np.testing.assert_array_equal(np.asarray(images.load(frame[::2, ::-1, ::-1])), frame[::2, ::-1, ::-1])


def test_a_string_is_a_path(tmp_path: Path) -> None:
    picture_of(5, 4).save(tmp_path / "a.png")
    assert images.load(str(tmp_path / "a.png")).size == (5, 4)


@pytest.mark.parametrize(("frame", "message"), [
    (np.zeros((4, 4, 3), np.float32), r"not float32 \[4, 4, 3\]"),
    (np.zeros((4, 4, 3), np.uint16), r"not uint16 \[4, 4, 3\]"),
    (np.zeros((3, 4, 4), np.uint8), r"not uint8 \[3, 4, 4\]"),
    (np.zeros((4, 4, 4), np.uint8), r"not uint8 \[4, 4, 4\]"),
    (np.zeros((2, 4, 4, 3), np.uint8), r"not uint8 \[2, 4, 4, 3\]"),
    (np.zeros(4, np.uint8), r"not uint8 \[4\]"),
    (np.zeros((0, 4, 3), np.uint8), r"the camera frame is empty \(4 x 0 pixels\)"),
])
def test_other_arrays_are_refused(frame: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        images.load(frame)


# Pictures that cannot be used

def refusal(source: object) -> str:
    """The message that refuses a picture: one line, with a way out after the last colon or semicolon."""
    with pytest.raises(InputError) as caught:
        images.load(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nothing.png"
    assert refusal(path) == f"{path}: no such file; give the path of a picture on this device"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read (")


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    assert refusal(path) == f"{path} is not a picture of a known format: convert it to PNG or JPEG"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert refusal(path).startswith(f"{path} is not a picture")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".bmp"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"short{suffix}"
    picture_of(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    message = refusal(path)
    assert message.startswith(f"{path} is ")
    assert message.endswith((": copy or save it again", ": convert it to PNG or JPEG"))


def test_an_open_picture_cut_short_is_refused() -> None:
    file = io.BytesIO()
    picture_of(200, 200).save(file, "JPEG")
    assert refusal(Image.open(io.BytesIO(file.getvalue()[:5000]))).startswith("the picture is damaged or cut short (")


def test_a_claim_of_too_many_pixels_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(np.zeros((1, 1), np.uint8), 8, 0, size=(20000, 20000)))
    message = refusal(path)
    assert message.startswith(f"{path} is too large (Image size (400000000 pixels)")
    assert message.endswith(": scale it down first")


def test_up_to_the_hard_limit_of_pixels_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # pillow warns above it and refuses above twice as many
    for edge in (44, 45):
        picture_of(edge, edge).save(tmp_path / f"{edge}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.load(tmp_path / "44.png").size == (44, 44)
        assert refusal(tmp_path / "45.png").startswith(f"{tmp_path / '45.png'} is too large (")
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_empty_picture_is_refused(size: tuple[int, int]) -> None:
    assert refusal(Image.new("RGB", size)) == \
        f"the picture is empty ({size[0]} x {size[1]} pixels): give one of at least 1 x 1"


def test_a_file_that_claims_no_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    path.write_bytes(png(np.zeros((1, 1), np.uint8), 8, 0, size=(0, 5)))
    assert str(path) in refusal(path)


def test_a_floating_point_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)).save(path)
    assert refusal(path) == f"{path} is a floating-point picture, whose range is unknown: save it with 8 or 16 bits"


@pytest.mark.parametrize("source", [None, 3, b"picture.png", [[0, 0], [0, 0]]])
def test_what_is_neither_path_nor_picture_is_refused(source: object) -> None:
    assert f"not {type(source).__name__}" in refusal(source)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".bmp", ".ppm", ".ico"])
def test_damage_anywhere_gives_a_picture_or_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture_of(48, 40).save(path, **({"exif": exif} if suffix in {".jpg", ".png", ".webp", ".tif"} else {}))
    sound, dice, refused = path.read_bytes(), random.Random(suffix), 0
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(dice.randrange(1, 8)):
            data[dice.randrange(min(len(data), dice.choice([40, 400, 10_000])))] = dice.randrange(256)
        path.write_bytes(data[:dice.choice([len(data), dice.randrange(len(data))])])
        try:
            assert images.load(path).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


# Tiles: against plain pillow calls

def tiled(tiles: tuple[int, int], overview: str, size: tuple[int, int] = (12, 16), **more: object) -> ImageInfo:
    return ImageInfo(size, None, 3, 1 / 255, CLIP_MEAN, CLIP_STD, tiles, overview, **more)  # type: ignore[arg-type]


def same(actual: Image.Image, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), rows=st.integers(1, 3), columns=st.integers(1, 3),
       overview=st.sampled_from(["", "first", "last", "last of canvas"]))
def test_tiles_are_cut_row_by_row_with_the_overview_where_it_belongs(width: int, height: int, rows: int, columns: int, overview: str) -> None:
    picture, info = picture_of(width, height), tiled((rows, columns), overview)
    assert info.canvas == (12 * rows, 16 * columns) and info.count == rows * columns + (overview != "")
    canvas = picture.resize((16 * columns, 12 * rows), Image.Resampling.BICUBIC)
    expected = []
    for top in range(0, 12 * rows, 12):
        for left in range(0, 16 * columns, 16):
            expected.append(canvas.crop((left, top, left + 16, top + 12)))
    whole = picture.resize((16, 12), Image.Resampling.BICUBIC)
    expected = {"": expected, "first": [whole, *expected], "last": [*expected, whole],
                "last of canvas": [*expected, canvas.resize((16, 12), Image.Resampling.BICUBIC)]}[overview]
    found = images.tiles(picture, info)
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        same(actual, wanted)
    pixels = images.preprocess(picture, info)
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert pixels.shape == ((3, 12, 16) if len(expected) == 1 else (len(expected), 3, 12, 16))
    for actual, wanted in zip(pixels.reshape(-1, 3, 12, 16), expected):
        values = (np.asarray(wanted) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        np.testing.assert_allclose(actual, values.transpose(2, 0, 1), atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(width=st.integers(1, 120), height=st.integers(1, 120), box=st.tuples(st.integers(1, 24), st.integers(1, 32)))
def test_a_letterbox_keeps_the_aspect_and_is_black_around_the_middle(width: int, height: int, box: tuple[int, int]) -> None:
    """The larger side fills the box; the other is what the aspect makes of it, rounded up."""
    picture, info = picture_of(width, height), tiled((2, 2), "first", box=box)
    if box[1] * height <= box[0] * width:  # the width is what fits
        inner = (box[1], min(-(-height * box[1] // width), box[0]))
    else:
        inner = (min(-(-width * box[0] // height), box[1]), box[0])
    found = images.fit(picture, info)
    assert found.size == (32, 24)
    values = np.asarray(found)
    fitted = [np.asarray(picture.resize((inner[0] + dx, inner[1] + dy), Image.Resampling.BICUBIC)) for dx in (0, 1) for dy in (0, 1)]
    places = [((32 - f.shape[1]) // 2, (24 - f.shape[0]) // 2, f) for f in fitted]  # one more pixel where a float is just above a whole number
    matching = [(left, top, f) for left, top, f in places if left >= 0 and top >= 0
                and np.array_equal(values[top:top + f.shape[0], left:left + f.shape[1]], f)]
    assert matching
    left, top, f = matching[0]
    around = np.ones(values.shape[:2], bool)
    around[top:top + f.shape[0], left:left + f.shape[1]] = False
    assert (values[around] == 0).all()
    same(images.tiles(picture, info)[0], picture.resize((16, 12), Image.Resampling.BICUBIC))  # the overview is of the picture, not of the canvas


@pytest.mark.parametrize(("size", "by_edge"), [
    ((100, 50), (40, 20)), ((50, 100), (20, 40)), ((100, 33), (40, 14)), ((33, 100), (14, 40)), ((77, 77), (40, 40)), ((1000, 1), (40, 1)),
    ((1, 1000), (1, 40)), ((1000, 30), (40, 2)), ((10, 5), (40, 20))])
def test_a_longest_edge_comes_first_with_the_other_one_even(size: tuple[int, int], by_edge: tuple[int, int]) -> None:
    picture, info = picture_of(*size), tiled((2, 2), "last of canvas", longest_edge=40)
    canvas = picture.resize(by_edge, Image.Resampling.BICUBIC).resize((32, 24), Image.Resampling.BICUBIC)
    same(images.fit(picture, info), canvas)
    same(images.tiles(picture, info)[-1], canvas.resize((16, 12), Image.Resampling.BICUBIC))


def test_what_happens_to_other_shapes_has_a_word() -> None:
    assert [info.fit for info in (CLIP, SIGLIP, tiled((1, 2), "first", box=(12, 20)), tiled((1, 1), "", longest_edge=40))] == [
        "cropped", "resized", "letterboxed", "resized"]
