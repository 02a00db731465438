"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against Hugging Face: pictures, towers with windows and deepstack, M-RoPE, whole answers."""
from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import torch
from click.testing import CliRunner
from harness import STEPS, assert_same, hugging_face
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLProcessor
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from edgecomp import methods
from edgecomp.cli import main
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp_export import checkpoint
from edgecomp_export.families import family_of
from edgecomp_export.families.base import Family, Geometry
from edgecomp_export.reference import Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.images import load, preprocess
from edgecomp_runtime.manifest import PlanInfo
from edgecomp_runtime.rows import Layout, VisualTokens, lay_out

RANDOM = np.random.default_rng(1)
QUESTION = "what is this?"
ROOT = Path(__file__).parents[2]
VARIANTS = [variant for variant in tiny_qwen.VARIANTS if variant != "qwen3-tied-one-kv-head"]  # that one is tried in fp16
SCENES = sorted((ROOT / "examples/scenes/images").glob("*.jpg"))


@dataclass(frozen=True)
class Made:
    """A tiny checkpoint and its bundle."""
    variant: tiny_qwen.Variant
    checkpoint: Path
    bundle: Bundle

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.variant.size)

    def picture(self, stretch: float = 1.0) -> np.ndarray:
        """Noise of the size that this bundle takes, or a little larger."""
        height, width = (round(side * stretch) for side in self.bundle.manifest.image.size)
        return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def made(compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A variant's checkpoint, and its bundle with plans, made once each and verified layer by layer."""
    found: dict[str, Made] = {}

    def make(variant: str) -> Made:
        if variant not in found:
            folder, neutral = compiled(tiny_qwen, variant, image_size=tiny_qwen.VARIANTS[variant].size)
            recipes = [Recipe.of(methods.make("dart"), "25%"), Recipe.of(methods.make("dart"), "40%", position="compact")]
            if variant == "qwen3-wide-heads":  # pooled features of the deepstack, too
                recipes.append(Recipe.of(methods.make("pool"), "4"))
            out = tmp_path_factory.mktemp(variant) / "bundle"
            compress(neutral, out, recipes)
            verified = CliRunner().invoke(main, ["verify", str(out)])
            assert verified.exit_code == 0, verified.output
            found[variant] = Made(tiny_qwen.VARIANTS[variant], folder, Bundle.open(out))
        return found[variant]
    return make


def hf_inputs(folder: Path, messages: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What HF's processor makes of a conversation, by its parts: as a whole it needs torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images = processor(images=list(pictures), return_tensors="pt")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    parts = text.split("<|image_pad|>")
    assert len(parts) == len(pictures) + 1
    self = SimpleNamespace(image_processor=processor, image_token="<|image_pad|>")
    text = parts[0] + "".join(Qwen2_5_VLProcessor.replace_image_token(self, images, n) + part for n, part in enumerate(parts[1:]))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == tiny_qwen.IDS["image_token_id"]).int(), **images}


def asking(question: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_says_what_hugging_face_says(variant: str, made: Callable[[str], Made]) -> None:
    it = made(variant)
    session = Session(it.bundle, plan="full")
    picture = it.picture()
    inputs = hf_inputs(it.checkpoint, [asking(QUESTION)], [picture])
    model = AutoModelForImageTextToText.from_pretrained(it.checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    seen = session.visual_tokens(picture)
    assert np.abs(seen.tokens - features.pooler_output[0].numpy()).max() < 1e-4
    for mine, theirs in zip(() if seen.deepstack is None else seen.deepstack, getattr(features, "deepstack_features", ()), strict=True):
        assert np.abs(mine - theirs[0].numpy()).max() < 1e-4
    expected = hugging_face(it.checkpoint, inputs)
    assert_same(session, QUESTION, [picture], expected, 1e-4)
    generation = session.generate(QUESTION, [picture], max_new_tokens=STEPS)
    generation.finish()
    assert generation.token_ids == list(takewhile(lambda i: i != tiny_qwen.TEXT["eos_token_id"], expected[0]))


@pytest.mark.parametrize("variant", ["qwen2.5-ragged", "qwen3-wide-heads"])
def test_conversations_of_several_turns_and_pictures(variant: str, made: Callable[[str], Made]) -> None:
    it = made(variant)
    session = Session(it.bundle, plan="full")
    pictures = [it.picture(), it.picture(1.02), it.picture(0.98)]
    messages = [{"role": "system", "content": "answer in a word"}, asking("which of these?", 2), {"role": "assistant", "content": "red"},
                {"role": "user", "content": [{"type": "text", "text": "and this"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    inputs = hf_inputs(it.checkpoint, messages, pictures)
    tokenizer = AutoTokenizer.from_pretrained(it.checkpoint)
    unexpanded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert session.text.render(messages) == unexpanded and session.text.encode(unexpanded) == tokenizer(unexpanded)["input_ids"]
    assert_same(session, messages, pictures, hugging_face(it.checkpoint, inputs), 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compressed_plans_say_what_hugging_face_says_of_the_same_tokens(variant: str, made: Callable[[str], Made]) -> None:
    it = made(variant)
    reference = Reference(str(it.checkpoint), "eager", it.geometry)  # sdpa has no sliding windows
    for plan in set(it.bundle.manifest.plans) - {"full"}:
        found, = verify(Session(it.bundle, plan=plan), reference, [(it.picture(), QUESTION)], most=STEPS)
        assert found.same and found.logits < 1e-4, plan


@pytest.mark.parametrize("variant", ["qwen2-sliding-tied", "qwen2.5-ragged", "qwen3-tied-one-kv-head"])
def test_fp16_stays_near_fp32(variant: str, tmp_path: Path) -> None:
    # at the other tests' scale, logits are larger than 5 and rounding in the tower is multiplied from layer to layer
    folder = tiny_qwen.make(variant, tmp_path / "checkpoint", ROOT / "examples/scenes-llava", torch.float16, scale=0.12)
    compile_model(str(folder), tmp_path / "bundle", [], precision="fp16", image_size=tiny_qwen.VARIANTS[variant].size, context=256)
    session = Session(Bundle.open(tmp_path / "bundle"))
    assert session.bundle.manifest.decoder.context == 256
    same = 0
    for scene in SCENES[:2]:
        picture = np.asarray(Image.open(scene).resize(session.bundle.manifest.image.size[::-1]))
        ids, logits = hugging_face(folder, hf_inputs(folder, [asking(QUESTION)], [picture]))
        mine = session.score(QUESTION, [picture], ids[:-1]).astype(np.float32)
        assert 1 < np.abs(logits).max() < 6
        assert np.abs(mine - logits).max() < 5e-3
        same += int((mine.argmax(1) == ids).sum())
    assert same >= 0.95 * 2 * STEPS


def odd_pictures() -> list[Any]:
    """Real ones, and of every mode and many shapes."""
    def noise(*shape: int) -> np.ndarray:
        return RANDOM.integers(0, 256, shape, np.uint8)
    colour = Image.fromarray(noise(60, 80, 3))
    clear = Image.fromarray(noise(50, 70, 4), "RGBA")
    return [*SCENES[:5], colour, Image.fromarray(noise(64, 48)), clear, colour.convert("P"), colour.convert("L").convert("1"), colour.convert("CMYK"),
            clear.convert("LA"), Image.fromarray(noise(1, 150, 3)), Image.fromarray(noise(150, 1, 3)), Image.fromarray(noise(1, 1, 3)),
            Image.fromarray(noise(2, 3, 3)), Image.fromarray(noise(700, 30, 3)), Image.fromarray(noise(30, 700, 3)),
            Image.fromarray(noise(1333, 777, 3)), noise(99, 101, 3), noise(400, 400, 3)]


@pytest.mark.parametrize("settings", [{}, {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, **tiny_qwen.SIXTEEN}])
def test_pictures_become_what_hugging_face_makes_of_them(settings: dict[str, Any]) -> None:
    processor = Qwen2VLImageProcessorPil(**settings)
    config = tiny_qwen.config("qwen3_vl" if settings else "qwen2_5_vl")
    patch = config.vision_config.patch_size
    for picture in odd_pictures():
        given = picture if isinstance(picture, np.ndarray) else load_image(str(picture) if isinstance(picture, Path) else picture)
        theirs = processor(images=given, return_tensors="pt")
        _, rows, columns = theirs["image_grid_thw"][0].tolist()
        family = family_of(config.model_type)(config, processor.to_dict(), Geometry((rows * patch, columns * patch)))
        mine = preprocess(load(picture), family.image_info())
        assert (family.hf_pixels(torch.from_numpy(mine)[None])["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5
        assert np.abs(family.hf_preprocess(processor, given)[0].numpy() - mine).max() < 1e-5
        elsewhere = family_of(config.model_type)(config, processor.to_dict(), Geometry((rows * patch, (columns + 2) * patch)))
        assert elsewhere.hf_preprocess(processor, given) is None, "HF makes another grid of this picture"
    thin = Image.fromarray(RANDOM.integers(0, 256, (1, 900, 3), np.uint8))
    assert family.hf_preprocess(processor, thin) is None and preprocess(load(thin), family.image_info()).shape == mine.shape


def test_the_default_size_is_within_the_processors_limits_in_every_spelling() -> None:
    config = tiny_qwen.config("qwen2_vl")
    for least, most in ((3136, 12845056), (3136, 1003520), (784, 784), (784, 20000), (500000, 600000), (200704, 200704), (150000, 150500)):
        expected = smart_resize(448, 448, 28, least, most)
        for settings in ({"size": {"shortest_edge": least, "longest_edge": most}}, {"min_pixels": least, "max_pixels": most},
                         {"size": {"min_pixels": least, "max_pixels": most}, "min_pixels": least, "max_pixels": most}):
            assert family_of("qwen2_vl")(config, settings).size() == expected  # type: ignore[attr-defined]
    assert family_of("qwen2_vl")(config, {}).size() == (448, 448)  # type: ignore[attr-defined]


def family_and_model(model_type: str, size: tuple[int, int]) -> tuple[Family, Any]:
    """A family at one size of pictures, and HF's model without weights, which can tell positions."""
    config = tiny_qwen.config(model_type)
    with torch.device("meta"):
        model = tiny_qwen.CLASSES[model_type][1](config)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return family_of(model_type)(config, settings, Geometry(size)), model


@pytest.mark.parametrize("model_type", tiny_qwen.CLASSES)
@pytest.mark.parametrize("grid", [(2, 5), (5, 2), (1, 1), (3, 3), (1, 7)])
@pytest.mark.parametrize("position", ["keep", "compact"])
def test_positions_are_hugging_faces(model_type: str, grid: tuple[int, int], position: str) -> None:
    config = tiny_qwen.config(model_type)
    block = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    family, model = family_and_model(model_type, (grid[0] * block, grid[1] * block))
    image, tokens = config.image_token_id, grid[0] * grid[1]
    decoder = family.decoder_info(None)
    layout = Layout.of(family.vision_info(decoder), decoder, PlanInfo((), position, tokens, (tokens,), (decoder.context,), {}))

    def rows(ids: list[int], kept: np.ndarray, layout: Layout) -> Any:
        seen = [VisualTokens(str(n), np.zeros((len(kept), 4), np.float32), kept) for n in range(ids.count(image))]
        return lay_out(ids, image, seen, lambda given: np.zeros((len(given), 4), np.float32), layout)
    for ids in ([9, image, 9, 9], [9] * 7 + [4, image, 5, 4, image, 5, 9], [image, 9, 9, 9, image, 9, image], [8, 9, image]):
        expanded = torch.tensor([[i for token in ids for i in [token] * (tokens if token == image else 1)]])
        grids = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * ids.count(image))
        types = (expanded == image).int()
        theirs, delta = model.model.get_rope_index(expanded, mm_token_type_ids=types, image_grid_thw=grids)
        found = rows(ids, np.arange(tokens), layout)
        assert (found.positions == theirs[:, 0].numpy()).all()
        assert found.next_position == expanded.shape[1] + int(delta), "where HF's generate goes on"
        assert (family.hf_positions(model, expanded, ids.count(image)) == theirs[:, 0].numpy()).all()
        if position == "keep" and tokens > 3:  # what is kept stays where it was, and what follows it too
            kept = np.sort(RANDOM.choice(tokens, 3, replace=False))
            pruned = Layout.of(family.vision_info(decoder), decoder, PlanInfo((), position, 3, (3,), (decoder.context,), {}))
            number, mine = np.cumsum(types[0].numpy()) - 1, types[0].numpy() == 0
            mine |= np.isin(number % tokens, kept)
            found = rows(ids, kept, pruned)
            assert (found.positions == theirs[:, 0].numpy()[:, mine]).all() and found.next_position == expanded.shape[1] + int(delta)


def test_sizes_that_cannot_be_are_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    folder = made("qwen2-sliding-tied").checkpoint
    for arguments, said in ((("--image-size", "100x56"), "made of visual tokens of 28x28 pixels: choose 84x56, 112x56"),
                            (("--image-size", "20x57"), "choose 28x56, 28x84"),
                            (("--image-size", "14x14"), "choose 28x28"),
                            (("--tiles", "2"), "--tiles has no effect on a qwen2_vl model"),
                            (("--no-tiles",), "--tiles has no effect on a qwen2_vl model"),
                            (("--image-size", "672x672"), "a window of 512 rows does not hold")):
        result = CliRunner().invoke(main, ["compile", str(folder), "-o", str(tmp_path / "bundle"), *arguments])
        assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output
        assert list(tmp_path.iterdir()) == []


def test_what_is_chosen_on_the_command_line_reaches_the_export(made: Callable[[str], Made], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    it, asked = made("qwen2-sliding-tied"), dict[str, Any]()

    def export(model: str, out: Path, *, say: Any, **choices: Any) -> Path:
        asked.update(choices, model=model)
        return Path(shutil.copytree(it.bundle.path, out))
    monkeypatch.setattr("edgecomp_export.export.export", export)
    result = CliRunner().invoke(main, ["compile", str(it.checkpoint), "-o", str(tmp_path / "bundle"), "--method", "dart", "--keep", "30%",
                                       "--context", "480", "--image-size", "56x140", "--tiles", "4", "--max-images", "2", "--precision", "fp16"])
    assert result.exit_code == 0, result.output
    assert asked == {"model": str(it.checkpoint), "precision": "fp16", "context": 480, "image_size": (56, 140), "tiles": 4, "max_images": 2}
    assert Bundle.open(tmp_path / "bundle").manifest.default_plan == "dart-3"


def test_a_processor_that_is_not_the_towers_is_refused() -> None:
    config = tiny_qwen.config("qwen2_vl")
    with pytest.raises(checkpoint.CheckpointError, match="the image processor's patch_size is 16, the vision tower's 14"):
        family_of("qwen2_vl")(config, {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}).image_info()
