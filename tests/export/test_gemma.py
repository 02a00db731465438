"""Gemma 3 and PaliGemma against Hugging Face's own classes: tower, prompt, masks both ways, windows, caps, and reuse of rows."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tiny_gemma
import torch
from harness import STEPS, assert_same, hugging_face
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Gemma3Processor, PaliGemmaProcessor
from transformers.image_utils import load_image

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp.dialects import onnxruntime
from edgecomp.ir.graphs import load as load_graph
from edgecomp.ir.graphs import save as save_graph
from edgecomp_export import checkpoint as checkpoints
from edgecomp_export.families import family_of
from edgecomp_export.families.base import Geometry, visible
from edgecomp_export.reference import Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session
from edgecomp_runtime.errors import EdgecompError, InputError
from edgecomp_runtime.generation import Statistics
from edgecomp_runtime.images import load, preprocess

QUESTION = "what is this?"
NOISE = np.random.default_rng(1)
PICTURES = [NOISE.integers(0, 256, shape, np.uint8) for shape in ((90, 120, 3), (64, 40, 3))]
CLOSE, HALF = 1e-4, 5e-3  # absolute, of logits up to about 5

Conversation = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(compiled: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Bundle]]:
    """Every variant's checkpoint and bundle."""
    found = {}
    for variant in tiny_gemma.VARIANTS:
        folder, bundle = compiled(tiny_gemma, variant)
        if variant in ("gemma3", "paligemma2"):
            neutral, bundle = bundle, tmp_path_factory.mktemp(variant) / "bundle"
            compress(neutral, bundle, [Recipe.of(methods.make("dart"), "25%"), Recipe.of(methods.make("pool"), "4")])
        found[variant] = folder, Bundle.open(bundle)
    return found


def processor(folder: Path) -> Any:
    """HF's processor class of a checkpoint, with its PIL image processor."""
    parts = AutoImageProcessor.from_pretrained(folder, use_fast=False), AutoTokenizer.from_pretrained(folder)
    if checkpoints.config(folder).model_type == "paligemma":
        return PaliGemmaProcessor(*parts)
    side = parts[0].size["height"] // 14
    return Gemma3Processor(*parts, chat_template=parts[1].chat_template, image_seq_length={8: 16, 7: 9}[side])


def asked(pictures: int, question: str = QUESTION) -> Conversation:
    return [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": question}]}]


def hf_inputs(folder: Path, messages: Conversation, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What HF's processor class makes of a conversation."""
    made = processor(folder)
    if isinstance(made, PaliGemmaProcessor):
        text = "<image>" * len(pictures) + messages[0]["content"][-1]["text"]
    else:
        text = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    bos = {"add_special_tokens": False} if text.startswith("<s>") else {}
    inputs = made(images=[Image.fromarray(p) for p in pictures] or None, text=text, return_tensors="pt", **bos)
    wanted = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
    return {name: inputs[name] for name in wanted if name in inputs}


CONVERSATION: Conversation = [
    {"role": "user", "content": [{"type": "text", "text": "look:"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a shape."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
]
CASES = {"one picture": (asked(1), 1), "two pictures": (asked(2), 2), "turns": (CONVERSATION, 2), "text": (asked(0), 0)}


@pytest.mark.parametrize(("variant", "case"), [
    *(("gemma3", case) for case in CASES), ("gemma3-untied", "one picture"), ("gemma3-untied", "turns"),
    *((variant, case) for variant in ("paligemma", "paligemma2") for case in ("one picture", "two pictures"))])
def test_ten_tokens_are_hugging_faces(made: dict[str, tuple[Path, Bundle]], variant: str, case: str) -> None:
    folder, bundle = made[variant]
    messages, count = CASES[case]
    pictures = PICTURES[:count]
    inputs = hf_inputs(folder, messages, pictures)
    session = Session(bundle, plan="full")
    tokens, prompt = bundle.manifest.vision.tokens, session._prepare(messages, pictures, False, 0)[0]
    runs = [token for i in prompt for token in [i] * (tokens if i == bundle.manifest.text.image_id else 1)]
    assert runs == inputs["input_ids"][0].tolist()
    expected = hugging_face(folder, inputs)
    assert 0.5 < np.abs(expected[1]).max() < 20 and len(expected[0]) == STEPS
    assert_same(session, messages, pictures, expected, CLOSE)


@pytest.mark.parametrize("variant", tiny_gemma.VARIANTS)
def test_visual_tokens_are_hugging_faces(made: dict[str, tuple[Path, Bundle]], variant: str) -> None:
    folder, bundle = made[variant]
    session, reference = Session(bundle, plan="full"), Reference(str(folder))
    for picture in PICTURES:
        mine = session.visual_tokens(picture).tokens
        theirs = reference.features(reference.pixels(Image.fromarray(picture)))[0][0].numpy()  # type: ignore[arg-type]
        assert mine.shape == theirs.shape and np.abs(theirs).max() > 0.5
        assert np.abs(mine - theirs).max() < CLOSE


@pytest.mark.parametrize("variant", ["gemma3", "paligemma2"])
def test_compressed_plans_are_hugging_face_with_those_tokens(made: dict[str, tuple[Path, Bundle]], variant: str) -> None:
    folder, bundle = made[variant]
    reference = Reference(str(folder))
    for plan in bundle.manifest.plans:
        found, = verify(Session(bundle, plan=plan), reference, [(PICTURES[0], QUESTION)], most=STEPS)
        assert found.same and found.logits < CLOSE, plan


@pytest.mark.parametrize("variant", ["gemma3", "paligemma2"])
def test_fp16_stays_near_fp32(checkpoint: Path, tmp_path: Path, variant: str) -> None:
    folder = tiny_gemma.make(variant, tmp_path / variant, checkpoint, torch.float16)
    compile_model(str(folder), tmp_path / "bundle", [], precision="fp16")
    ids, logits = hugging_face(folder, hf_inputs(folder, asked(2), PICTURES))
    mine = Session(Bundle.open(tmp_path / "bundle")).score(asked(2), PICTURES, ids[:-1]).astype(np.float32)
    assert np.abs(mine - logits).max() < HALF
    assert [int(i) for i in mine.argmax(1)] == ids


@pytest.mark.parametrize("variant", ["gemma3", "paligemma2"])
def test_reused_rows_answer_as_a_fresh_session_does(made: dict[str, tuple[Path, Bundle]], variant: str) -> None:
    _, bundle = made[variant]
    warm = Session(bundle, plan="full")
    calls = [(CONVERSATION[:1], 1), (CONVERSATION, 2), (CONVERSATION, 2), ([*CONVERSATION[:2], *asked(0, "where?")], 1)] \
        if variant == "gemma3" else [(asked(1), 1), (asked(1), 1), (asked(1, "what is that?"), 1), (asked(2), 2)]
    reused = []
    for messages, count in calls:
        again, fresh = (s.generate(messages, PICTURES[:count], max_new_tokens=6) for s in (warm, Session(bundle, plan="full")))
        again.finish(), fresh.finish()
        assert again.token_ids == fresh.token_ids
        reused.append(again.statistics.reused_rows)
        scores = [s.score(messages, PICTURES[:count], fresh.token_ids) for s in (warm, Session(bundle, plan="full"))]
        assert np.abs(scores[0] - scores[1]).max() < CLOSE
    if variant == "gemma3":
        assert all(rows > bundle.manifest.vision.tokens for rows in reused[1:])
    else:
        assert reused == [0] * len(calls), "a prompt that sees itself both ways is computed as a whole"


@pytest.mark.parametrize("chunk", [1, 5, 16, 20])
def test_prompts_in_parts_are_the_whole(made: dict[str, tuple[Path, Bundle]], chunk: int) -> None:
    for variant in ("gemma3", "paligemma2"):
        bundle = made[variant][1]
        whole, parts = Session(bundle, plan="full"), Session(bundle, plan="full")
        parts._chunk = chunk
        scores = [s.score(asked(2), PICTURES, [5, 6, 7]) for s in (whole, parts)]
        assert np.abs(scores[0] - scores[1]).max() < CLOSE


@pytest.mark.parametrize("variant", ["gemma3", "paligemma"])
def test_pixels_are_hugging_faces(made: dict[str, tuple[Path, Bundle]], scenes: Path, variant: str) -> None:
    folder, bundle = made[variant]
    hugging = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    shapes = [(1, 1), (1, 50), (50, 1), (3, 200), (200, 3), (56, 56), (57, 113), (300, 200)]
    odd = [Image.fromarray(NOISE.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    odd += [odd[-1].convert(mode) for mode in ("L", "RGBA", "P", "1", "LA")]
    for picture in [*sorted((scenes / "images").glob("*.jpg"))[:7], *odd]:
        theirs = hugging(images=load_image(str(picture) if isinstance(picture, Path) else picture), return_tensors="np")["pixel_values"][0]
        assert np.abs(preprocess(load(picture), bundle.manifest.image) - theirs).max() < 1e-5


def test_who_sees_whom_is_hugging_faces() -> None:
    from transformers import Gemma2Config, Gemma3TextConfig
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 0]])
    blocks, rows = torch.where(segments > 0, segments, -1), torch.zeros(1, segments.shape[1], 8)
    given: dict[str, Any] = {"inputs_embeds": rows, "attention_mask": None, "past_key_values": None, "position_ids": None,
                             "block_sequence_ids": blocks}
    config = Gemma3TextConfig(sliding_window=3, attn_implementation="sdpa")
    gemma3 = create_masks_for_vision_model(config=config, **given)
    assert torch.equal(gemma3["full_attention"][0, 0], visible(segments))
    assert torch.equal(gemma3["sliding_attention"][0, 0], visible(segments, 3))
    gemma2 = create_sliding_window_causal_mask(config=Gemma2Config(sliding_window=3, attn_implementation="sdpa"), **given)
    assert torch.equal(gemma2[0, 0], visible(segments, 3, bounded=False))
    assert not torch.equal(gemma2, gemma3["sliding_attention"])


def test_paligemmas_positions_and_start_token_are_hugging_faces(made: dict[str, tuple[Path, Bundle]]) -> None:
    folder, bundle = made["paligemma"]
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids[0] == 1, "the checkpoint's tokenizer adds a start token, the processor takes it away"
    session, seen = Session(bundle, plan="full"), []
    inputs = hf_inputs(folder, asked(1), PICTURES[:1])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.model.language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    ids, pixels = session._prepare(asked(1), PICTURES[:1], False, 1)
    rows = session._rows(ids, pixels, Statistics())
    assert seen[0][0].tolist() == rows.positions[0].tolist() and seen[1].tolist() == [[rows.next_position]]
    assert inputs["input_ids"][0].tolist().count(1) == ids.count(1) == 1


def test_a_capped_head_is_split_as_others_are(made: dict[str, tuple[Path, Bundle]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made["paligemma2"][1]
    info, generator = bundle.manifest.decoder, np.random.default_rng(0)
    (tmp_path / "weights.bin").hardlink_to(bundle.file("graphs/weights.bin"))
    feeds = {"embeddings": generator.normal(0, 1, (1, 3, info.hidden)).astype(np.float32), "positions": np.arange(3)[None],
             "length": np.array([0]), "logit_rows": np.array([0, 2]), "segments": np.array([[1, 1, 0]]),
             "last_row": np.array([2], np.int32), "total_rows": np.array(3, np.int32)}
    feeds |= {f"cache_{kind}.{layer}": np.zeros((1, info.key_value_heads, 4, info.head_dim), np.float32)
              for layer in range(info.layers) for kind in ("key", "value")}
    logits, parts = [], []
    for piece in (onnxruntime.HEAD_PIECE, 20_000):
        monkeypatch.setattr(onnxruntime, "HEAD_PIECE", piece)
        monkeypatch.setattr(onnxruntime, "PAGE_ROWS", 64)
        model = load_graph(bundle.file("graphs/decoder.onnx"))
        onnxruntime.lower(model)
        parts.append(sum(node.op_type == "FusedMatMul" for node in model.graph))
        save_graph(model, tmp_path / "decoder.onnx")
        logits.append(ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0])
    assert parts[1] == parts[0] + 6, "420 words as 6 parts of 64 and a rest"
    np.testing.assert_allclose(*logits, atol=1e-6)


def test_paligemma_has_no_conversations(made: dict[str, tuple[Path, Bundle]]) -> None:
    session = Session(made["paligemma"][1], plan="full")
    for messages in (CONVERSATION, [{"role": "system", "content": "be brief"}, *asked(1)]):
        with pytest.raises(InputError, match="a PaliGemma model answers one prompt and has no conversations: give one user message"):
            session.generate(messages, PICTURES)


@pytest.mark.parametrize(("variant", "choice", "said"), [
    ("gemma3", Geometry(tiles=4), "--tiles 4: edgecomp does not cut pictures up for gemma3 models"),
    ("gemma3", Geometry(tiles=0), "--tiles has no effect"), ("gemma3", Geometry(image_size=(64, 64)), "--image-size has no effect"),
    ("paligemma", Geometry(tiles=2), "--tiles has no effect on a paligemma model")])
def test_choices_without_effect_are_refused(made: dict[str, tuple[Path, Bundle]], variant: str, choice: Geometry, said: str) -> None:
    folder = made[variant][0]
    config = checkpoints.config(folder)
    with pytest.raises(EdgecompError, match=said):
        family_of(config.model_type)(config, checkpoints.processor_settings(folder), choice).image_info()


def test_checkpoints_that_do_not_fit_together_are_refused(made: dict[str, tuple[Path, Bundle]]) -> None:
    folder = made["gemma3"][0]
    config, settings = checkpoints.config(folder), checkpoints.processor_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    family = family_of("gemma3")
    with pytest.raises(EdgecompError, match="do_pan_and_scan in the image processor's settings"):
        family(config, {**settings, "do_pan_and_scan": True}).image_info()
    config.mm_tokens_per_image = 9
    with pytest.raises(EdgecompError, match="mm_tokens_per_image is 9, and averaging 8x8 patches makes no such square"):
        family(config, settings).tiles()
    config.boi_token_index = 7
    with pytest.raises(EdgecompError, match="<start_of_image> as 412 and config"):
        family(config, settings).prepare_tokenizer(tokenizer)
