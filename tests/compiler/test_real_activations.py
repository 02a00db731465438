"""What methods see and do at every site, on the demonstration model and real pictures: signals are Hugging Face's, choices the numpy rules'."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import METHODS as BASELINES
from exposed import Exposed, Seen
from transformers import AutoModelForImageTextToText

from edgecomp import methods
from edgecomp.budget import Reduction, Tokens, nearest
from edgecomp.compress import Cut, Stage
from edgecomp.methods.base import Op, Place, Rule, Selection, Step, Taxonomy, top
from edgecomp.methods.reference import follow
from edgecomp_runtime import Bundle, Session, images
from edgecomp_runtime.generation import Statistics

PARTS = (75, 50, 33, 11, 5)  # percent
TIE = 1e-5  # relative, in float64: below it, rounding in fp32 may decide
CLOSE = 1e-5  # of signals, relative to the largest where that is above 1
PICTURES = ("scene-03.jpg", "scene-17.jpg", "scene-29.jpg")
IN_PROMPT = 2  # of the pictures
QUESTION = "what number is written, and which shapes stand beside it?"
SELECTIONS = [name for name in methods.METHODS if issubclass(methods.method_type(name), Selection)]
SITES = [(name, site) for name in SELECTIONS for site in methods.method_type(name).taxonomy.sites]
SLOW = {("cdpruner", 75), ("cdpruner", 50)}  # thousands of nodes, which onnxruntime takes long to load; smaller budgets are their first steps
LAYERS = {"encoder": 5, "projector": 0, "decoder": 3}


@dataclass(frozen=True)
class Real:
    """The demonstration bundle, two pictures' pixels, and the prefill of a prompt with both."""
    bundle: Bundle
    exposed: Exposed
    pixels: np.ndarray
    ids: list[int]
    feeds: dict[str, np.ndarray]
    visual: np.ndarray
    text: np.ndarray

    def __call__(self, method: Selection, kind: str, layer: int, keep: int) -> Seen:
        step = Reduction.of(method, Tokens.of(self.bundle.manifest), keep, kind)
        cut = Cut(Stage(method, str(keep)), kind, layer, step)
        if not cut.in_decoder:
            return self.exposed.vision([cut], self.pixels)[0]
        rows = {"visual_rows": self.visual, "text_rows": self.text, "length": np.zeros(1, np.int64)}
        return self.exposed.decoder([cut], {**self.feeds, **{f"{name}.{layer}": value for name, value in rows.items()}})[0]


@pytest.fixture(scope="module")
def real(demo: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    bundle = Bundle.open(demo)
    session = Session(bundle, plan="full", threads=1)
    paths = [scenes / "images" / name for name in PICTURES[:IN_PROMPT]]
    content = [*[{"type": "image"}] * len(paths), {"type": "text", "text": QUESTION}]
    ids, pixels = session._prepare([{"role": "user", "content": content}], paths, False, 0)
    rows = session._rows(ids, pixels, Statistics())
    tokens, image = bundle.manifest.vision.tokens, bundle.manifest.text.image_id
    every = [token for i in ids for token in [i] * (tokens if i == image else 1)]
    visual = np.flatnonzero(np.array(every) == image)
    feeds = rows.feeds(0, len(every), 0, np.array([len(every) - 1]), 0)
    looks = np.stack([images.preprocess(images.load(scenes / "images" / name), bundle.manifest.image) for name in PICTURES])
    return Real(bundle, Exposed(bundle, tmp_path_factory.mktemp("exposed")), looks, every, feeds, visual.reshape(len(paths), tokens),
                np.arange(visual[-1] + 1, len(every)))


@pytest.mark.parametrize(("name", "kind"), SITES)
def test_the_graph_follows_the_rule_at_every_step(real: Real, name: str, kind: str) -> None:
    method, (tile,) = methods.make(name), real.bundle.manifest.vision.tiles
    assert isinstance(method, Selection)
    clear, ties = 0, []
    for part in (part for part in PARTS if (name, part) not in SLOW):
        keep = nearest(real.bundle.manifest, method, tile.tokens * part // 100)
        seen, place = real(method, kind, LAYERS[kind], keep), Place((tile.rows, tile.columns), keep, kind)
        assert seen.order is not None and seen.order.shape == (len(seen.features), keep)
        for picture, order in enumerate(seen.order):
            rule = method.rule(place, *(values[picture].astype(np.float64) for values in (seen.features, *seen.signals)))
            checks = follow(rule, order)
            wrong = [(step, check.margin) for step, check in enumerate(checks) if not check.agrees]
            assert all(margin < TIE for _, margin in wrong), (keep, picture, wrong)
            ties += [f"{keep} of {PICTURES[picture]}, step {step}: {check.margin:.1e}" for step, check in enumerate(checks) if check.margin < TIE]
            clear += not wrong
    print(f"{name} at {kind}: {clear} trajectories are all the rule's, {len(ties)} near ties", *ties, sep="\n")
    assert clear, "at one budget of one picture at least all choices are the rule's"


# signals against Hugging Face's model

# own_attention copies a layer's norm, and normed is to find the last one all the same
NAMES = {"decoder": ("last_attention", "own_attention", "text_attention", "visual_embeddings", "text_embeddings", "normed", "text_normed", "keys",
                     "text_keys"),
         "vision": ("cls_attention", "column_attention", "column_attention:middle", "column_attention:1", "keys")}


@dataclass(frozen=True)
class Everything(Selection):
    """A method that reads all signals there are at its site."""
    name: ClassVar[str] = "everything"
    taxonomy: ClassVar[Taxonomy] = Taxonomy("reads all signals", "", "pruning", sites={"decoder": NAMES["decoder"], "encoder": NAMES["vision"],
                                                                                      "projector": NAMES["vision"]})

    def choose(self, op: Op, place: Place, features: Any, *signals: Any) -> Any:
        return top(op, signals[0], place.keep)

    def rule(self, place: Place, features: np.ndarray, *signals: np.ndarray) -> Rule:
        yield Step(signals[0], place.keep)


@dataclass(frozen=True)
class Theirs:
    """HF's model in float64 with eager attention, run once over the pictures and once over the prompt."""
    model: Any
    tower: Any
    vision_keys: list[np.ndarray]
    features: np.ndarray
    prompt: Any


@pytest.fixture(scope="module")
def theirs(real: Real, checkpoint: Path) -> Theirs:
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    keys: list[np.ndarray] = []
    hooks = [layer.self_attn.k_proj.register_forward_hook(lambda _, __, out: keys.append(out.numpy())) for layer in
             model.model.vision_tower.encoder.layers]
    ids, pixels = torch.tensor([real.ids]), torch.from_numpy(real.pixels).double()
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:]).numpy()
        prompt = model(input_ids=ids, pixel_values=pixels[:IN_PROMPT], attention_mask=torch.ones_like(ids), use_cache=True, output_attentions=True,
                       output_hidden_states=True)
    return Theirs(model, tower, keys, features, prompt)


def assert_close(mine: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert mine.shape == expected.shape, name
    assert np.abs(expected).max() > 1e-3
    assert np.abs(mine - expected).max() <= CLOSE * max(1.0, np.abs(expected).max()), name


@pytest.mark.parametrize("layer", [1, 2, 5, 7])
def test_decoder_signals_are_hugging_faces(real: Real, theirs: Theirs, layer: int) -> None:
    seen = real(Everything(), "decoder", layer, 64)
    out, visual, text = theirs.prompt, real.visual, real.text
    before, own = (out.attentions[n][0].mean(0).numpy() for n in (layer - 1, layer))  # [S, S]
    with torch.no_grad():
        normed = theirs.model.model.language_model.norm(out.hidden_states[layer])[0].numpy()
    keys = out.past_key_values.layers[layer - 1].keys[0].transpose(0, 1).flatten(1).numpy()  # [S, Hkv * d]
    hidden, entered = (out.hidden_states[n][0].numpy() for n in (layer, 0))

    def every(rows: np.ndarray) -> np.ndarray:  # what is about the text is the same for both pictures
        return np.stack([rows] * len(visual))
    expected = {"last_attention": before[-1][visual], "own_attention": own[-1][visual],
                "text_attention": np.stack([before[text][:, tokens] for tokens in visual]),
                "visual_embeddings": entered[visual], "text_embeddings": every(entered[text]), "normed": normed[visual],
                "text_normed": every(normed[text]), "keys": keys[visual], "text_keys": every(keys[text])}
    assert_close(seen.features, hidden[visual], "features")
    for name, mine in zip(NAMES["decoder"], seen.signals, strict=True):
        assert_close(mine, expected[name], name)
    assert_close(theirs.features[:IN_PROMPT], entered[visual], "HF's own features are what enters")


@pytest.mark.parametrize(("kind", "layer"), [("encoder", 3), ("encoder", 5), ("encoder", 8), ("projector", 0)])
def test_vision_signals_are_hugging_faces(real: Real, theirs: Theirs, kind: str, layer: int) -> None:
    seen, read = real(Everything(), kind, layer, 64), layer - 1 if kind == "encoder" else 7
    attention = [one.mean(1).numpy() for one in theirs.tower.attentions]  # [B, rows, rows] each
    keys = theirs.vision_keys[read]
    expected = {"cls_attention": attention[read][:, 0, 1:], "column_attention": attention[read].mean(1)[:, 1:],
                "column_attention:middle": attention[7 * 3 // 8].mean(1)[:, 1:], "column_attention:1": attention[1].mean(1)[:, 1:],
                "keys": keys.reshape(*keys.shape[:2], 4, -1).mean(2)[:, 1:]}
    features = theirs.features if kind == "projector" else theirs.tower.hidden_states[layer][:, 1:].numpy()
    assert_close(seen.features, features, "features")
    for name, mine in zip(NAMES["vision"], seen.signals, strict=True):
        assert_close(mine, expected[name], name)


def test_every_selection_is_tried_where_it_can_stand() -> None:
    assert set(BASELINES) - {"pool"} <= set(SELECTIONS) and {"encoder", "projector", "decoder"} == {site for _, site in SITES}
