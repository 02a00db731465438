"""The exporter against Hugging Face: every shape of LLaVA, and the demonstration model, through the whole bundle."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from conftest import TOLERANCE
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from edgecomp import methods
from edgecomp.compile import compile_model
from edgecomp.compress import Recipe, compress
from edgecomp_export.reference import Reference
from edgecomp_export.verify import verify
from edgecomp_runtime import Bundle, Session

PICTURE = np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8)
QUESTION = "what is this?"


def hf_inputs(folder: Path, image: Any, question: str, tokens: int) -> dict[str, torch.Tensor]:
    """What transformers' own processors make of one picture and question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                                        add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = torch.tensor([[i for each in ids for i in ([each] * tokens if each == 3 else [each])]])
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def assert_same(folder: Path, session: Session, image: Any, question: str, attention: str, new_tokens: int = 10) -> None:
    """The same greedy tokens, and logits within tolerance at every step."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    inputs = hf_inputs(folder, image, question, session.bundle.manifest.vision.tokens)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        expected = [int(i) for i in out[0, prompt:] if int(i) != 2]
        logits = model(input_ids=out[:, :prompt + len(expected)], pixel_values=inputs["pixel_values"]).logits[0, prompt - 1:].numpy()
    generation = session.generate(question, [image], max_new_tokens=new_tokens)
    generation.finish()
    assert generation.token_ids == expected
    assert np.abs(session.score(question, [image], expected) - logits).max() < TOLERANCE["fp32 logits"]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_shape_of_llava_says_what_hugging_face_says(variant: str, compiled: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, neutral = compiled(tiny, variant)
    assert len(list(folder.glob("*.safetensors"))) > 1, "the checkpoint comes in shards"
    compress(neutral, tmp_path / "bundle", [Recipe.of(methods.make("dart"), "7")])
    bundle = Bundle.open(tmp_path / "bundle")
    attention = "eager" if "softcap" in variant else "sdpa"
    assert_same(folder, Session(bundle, plan="full"), PICTURE, QUESTION, attention)
    compressed, = verify(Session(bundle, plan="dart-7"), Reference(str(folder)), [(PICTURE, QUESTION)], most=10)
    assert compressed.same and compressed.logits < TOLERANCE["fp32 logits"]


def test_verification_sees_a_bundle_of_another_checkpoint(compiled: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, bundle = compiled(tiny, "gqa-tied")
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
    model.save_pretrained(folder)
    found, = verify(Session(Bundle.open(bundle)), Reference(str(folder)), [(PICTURE, QUESTION)], most=10)
    assert found.logits > 10 * TOLERANCE["fp32 logits"]


def test_the_demonstration_model_answers_as_hugging_face_does(demo: Path, checkpoint: Path, scenes: Path) -> None:
    rows = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()][:12]
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    from PIL import Image
    for plan in ("full", "dart-576", "pool-576"):
        session = Session(Bundle.open(demo), plan=plan)
        for row in rows if plan == "full" else rows[:2]:
            inputs = hf_inputs(checkpoint, Image.open(scenes / row["image"]), row["question"], 576)
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
            expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
            assert session.generate(row["question"], [scenes / row["image"]], max_new_tokens=60).finish() == expected


def test_two_pictures_in_one_prompt(demo: Path, checkpoint: Path, scenes: Path) -> None:
    session = Session(Bundle.open(demo), plan="full")
    reference = Reference(str(checkpoint))
    pictures = [scenes / "images" / f"scene-0{n}.jpg" for n in (1, 2)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "how many shapes are there?"}]
    mine = session.score([{"role": "user", "content": content}], pictures, [])
    ids = torch.tensor([reference.ids("how many shapes are there?", 2, [576])])
    pixels = torch.cat([reference.pixels(p) for p in pictures])
    with torch.no_grad():
        theirs = reference.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, -1:].numpy()
    assert np.abs(mine - theirs).max() < TOLERANCE["fp32 logits"]


def test_compact_positions_equal_hugging_face_on_a_shorter_prompt(demo: Path, checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    name, = compress(demo, tmp_path / "bundle", [Recipe.of(methods.make("cls"), "64", position="compact")])
    session = Session(Bundle.open(tmp_path / "bundle"), plan=name)
    found = verify(session, Reference(str(checkpoint)), [(scenes / "images/scene-03.jpg", "describe the image.")])
    assert found[0].same and found[0].logits < TOLERANCE["fp32 logits"]


def test_fp16_stays_near_fp32(checkpoint: Path, demo: Path, scenes: Path, tmp_path: Path) -> None:
    compile_model(str(checkpoint), tmp_path / "half", [], precision="fp16")
    half, whole = Session(Bundle.open(tmp_path / "half")), Session(Bundle.open(demo), plan="full")
    weights = {b: sum(f.bytes for n, f in s.bundle.manifest.files.items() if n.endswith(".bin")) for b, s in (("half", half), ("whole", whole))}
    assert weights["half"] < 0.52 * weights["whole"]
    picture, answer = scenes / "images/scene-03.jpg", [10, 20, 30]
    logits = [s.score("what word is written?", [picture], answer).astype(np.float32) for s in (half, whole)]
    difference = np.abs(logits[0] - logits[1])
    assert difference.max() < TOLERANCE["fp16 logits"]
    assert half.generate("what word is written?", [picture]).finish() == whole.generate("what word is written?", [picture]).finish()


def test_neutral_graphs_keep_names_marks_and_one_copy_of_the_weights(demo: Path, checkpoint: Path) -> None:
    bundle = Bundle.open(demo)
    names = set(json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"])
    plan = bundle.manifest.plans["full"].variants["neutral"]
    graphs = {part: ir.load(bundle.file(plan[part])) for part in ("vision", "prefill")}
    hidden = {part: sorted(n.attributes["layer"].as_int() for n in g.graph if n.op_type == "Mark" and n.attributes["signal"].as_string() == "hidden")
              for part, g in graphs.items()}
    assert hidden == {"vision": list(range(8)), "prefill": list(range(8))}, "the tower's ninth layer is not used, so it is not there"
    weights = {n: v.const_value for g in graphs.values() for n, v in g.graph.initializers.items()}
    external = {n: t for n, t in weights.items() if isinstance(t, ir.ExternalTensor)}
    # transformers' module names differ from the checkpoint's by where `model.` and `language_model.` stand
    bare = {n.removeprefix("model.").replace("language_model.model.", "language_model.") for n in names}
    tied_and_made = {"lm_head.weight", "language_model.embed_tokens.weight", "vision_tower.embeddings.position_ids"}
    assert {n.removeprefix("model.") for n in external} <= bare | tied_and_made
    once = {t.offset: t.length or 0 for t in external.values()}
    size = bundle.file("graphs/weights.bin").stat().st_size
    assert size < sum(once.values()) + 4096 * (len(once) + 1), "nothing is stored twice"


def test_a_window_larger_than_trained_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--context 9000 exceeds the 4096 positions"):
        compile_model(str(checkpoint), tmp_path / "bundle", [], context=9000)
    assert list(tmp_path.iterdir()) == []
