"""Weights taken from a checkpoint one by one are those of a plain load, in every stored type; and graphs are traced without looking at them."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import ROOT

from edgecomp.cli import main
from edgecomp_export import checkpoint as checkpoints
from edgecomp_export.export import parameter_names
from edgecomp_export.trace import trace
from edgecomp_export.weights import DTYPES, Weights
from edgecomp_runtime.errors import EdgecompError

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPE: dict[str, Any] = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SHAPE, "vocab_size": 411, "hidden_size": 48, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
SIGLIP: dict[str, Any] = {**SHAPE, "hidden_size": 32, "image_size": 56, "patch_size": 14, "vision_use_head": False}


def gemma3() -> Any:
    """The hard one: its embeddings' scale, the root of 48, is a buffer that is computed, and coarse in bf16."""
    config = transformers.Gemma3Config(text_config={**TEXT, "sliding_window": 7, "sliding_window_pattern": 2}, mm_tokens_per_image=4,
                                       vision_config={"model_type": "siglip_vision_model", **SIGLIP}, image_token_index=3)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava(tied: bool) -> Any:
    vision = transformers.CLIPVisionConfig(**SHAPE, hidden_size=32, image_size=56, patch_size=14)
    text = transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3,
                                                                               tie_word_embeddings=tied))


def qwen2_5_vl() -> Any:
    text = {**TEXT, "hidden_size": 32, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
              "fullatt_block_indexes": [1], "window_size": 56}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


MODELS = {"gemma3": gemma3, "llava tied": lambda: llava(True), "llava untied": lambda: llava(False), "qwen2_5_vl": qwen2_5_vl}


@pytest.fixture(scope="module", params=[(model, stored) for model in MODELS for stored in STORED], ids=" in ".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    name, stored = request.param
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    made: Path = tmp_path_factory.mktemp("stored")
    model.to(STORED[stored]).save_pretrained(made, max_shard_size="60KB")
    assert len(list(made.glob("*.safetensors"))) > 1
    return made


def plain(folder: Path, precision: str) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPES[precision]).eval()


@pytest.mark.parametrize("precision", DTYPES)
def test_arrays_and_buffers_are_those_of_a_plain_load(folder: Path, precision: str) -> None:
    expected, model = plain(folder, precision), checkpoints.load(folder)
    weights = Weights(model, precision)
    theirs = dict(expected.named_parameters(remove_duplicate=False))
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == set(theirs)
    for name, parameter in theirs.items():
        array = weights.array(name)
        assert array is not None and array.dtype == parameter.detach().numpy().dtype
        np.testing.assert_array_equal(array, parameter.detach().numpy(), err_msg=name)
    mine = dict(model.named_buffers())
    assert set(mine) == {name for name, _ in expected.named_buffers()}
    for name, buffer in expected.named_buffers():
        assert torch.equal(mine[name].to(buffer.dtype), buffer), name
        # of a model stored in fp32 the scale of Gemma's embeddings keeps its digits in fp16, which no graph reads
        assert mine[name].dtype == buffer.dtype or (mine[name].dtype == torch.float32 and name.endswith("embed_scale")), name
        assert weights.array(name) is None, "a buffer has its content itself"
    assert weights.array("no.such.weight") is None
    assert {p.dtype for p in model.parameters()} == {DTYPES[precision]} and model.dtype == DTYPES[precision]


def test_tied_weights_stay_tied(folder: Path) -> None:
    model = checkpoints.load(folder)
    tied = model.config.tie_word_embeddings
    weights = Weights(model, "fp32")
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (table is head) == tied
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is table]
    assert len(names) == (2 if tied else 1)
    first, *others = [weights.array(name) for name in names]
    assert all(np.array_equal(first, other) for other in others)  # type: ignore[arg-type]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, and no leftover of another test's model."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_only_what_was_filled_has_its_content_and_only_until_it_is_emptied(folder: Path) -> None:
    expected, model = dict(plain(folder, "fp32").named_parameters()), checkpoints.load(folder)
    weights = Weights(model, "fp32")

    def filled() -> set[str]:
        return {name for name, parameter in model.named_parameters() if torch.equal(parameter.data, expected[name].data)}

    layer = model.model.language_model.layers[1]
    of_the_layer = {name for name, parameter in model.named_parameters() if any(parameter is p for p in layer.parameters())}
    assert filled() == set() and len(of_the_layer) > 5
    weights.fill(layer)
    assert filled() == of_the_layer
    weights.empty(layer)
    assert filled() == set()
    weights.fill(model)
    assert filled() == set(expected)
    weights.empty(model)
    assert filled() == set()


def test_a_filled_model_computes_what_a_plain_load_computes(folder: Path) -> None:
    expected, model = plain(folder, "fp32"), checkpoints.load(folder)
    Weights(model, "fp32").fill(model)
    ids = torch.tensor([[1, 17, 40, 8, 301]])
    with torch.no_grad():
        theirs, mine = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (expected, model))
    assert float(theirs.abs().max()) > 0.1 and torch.equal(mine, theirs)


@pytest.mark.parametrize("stored", ["bf16", "fp32"])
@pytest.mark.parametrize("value", [70000.0, -3e38])
def test_a_weight_beyond_fp16_is_refused_in_one_line(stored: str, value: float, tmp_path: Path) -> None:
    model = llava(False)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 4] = value
    model.to(STORED[stored]).save_pretrained(tmp_path)
    loaded = checkpoints.load(tmp_path)
    weights = Weights(loaded, "fp16")
    with pytest.raises(EdgecompError) as refused:
        weights.array(name)
    reached = float(torch.tensor(abs(value)).to(STORED[stored]))
    assert str(refused.value) == f"the weight {name} reaches {reached:.3g}, and fp16 ends at 65504: use --precision fp32"
    assert weights.array(name.replace("up_proj", "down_proj")) is not None
    whole = Weights(checkpoints.load(tmp_path), "fp32").array(name)
    assert whole is not None and float(np.abs(whole).max()) == reached


def test_an_export_that_meets_such_a_weight_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    import tiny
    folder = tiny.make("scaled-rope", tmp_path / "model", checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    result = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "out"), "--precision", "fp16"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1] == ("edgecomp: the weight model.language_model.layers.1.mlp.down_proj.weight reaches 1e+05, "
                                              "and fp16 ends at 65504: use --precision fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# tracing

class Telling(torch.nn.Module):
    """Everything that an optimiser could see through if it knew the content: zero biases, scales of one, norms of one plus zero."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm, self.patch = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Conv1d(6, 6, 1)
        self.zero, self.one, self.scale = (torch.nn.Parameter(torch.full((n,), value)) for n, value in ((6, 0.0), (6, 1.0), (1, 1.0)))
        with torch.no_grad():
            for module in (self.line, self.patch):
                module.bias.zero_()
            self.line.weight.copy_(torch.eye(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.line(x) + self.zero) * self.one
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.zero)
        return self.patch(x.transpose(1, 2)).transpose(1, 2) * self.scale - self.zero * self.scale


class Wrapper(torch.nn.Module):
    def __init__(self, model: Telling):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def test_a_graph_traced_without_weights_computes_what_the_model_does_once_it_has_them() -> None:
    model = Telling().eval()
    graph = trace(Wrapper(model), (torch.zeros(2, 3, 6),), (["x"], ["y"]), ({0: "batch", 1: "rows"},), parameter_names(model))
    named = dict(model.named_parameters())
    assert set(graph.graph.initializers) >= set(named), "every weight is there, by its Hugging Face name, even where it is zero or one"
    assert {n.op_type for n in graph.graph} >= {"LayerNormalization"}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            graph.graph.initializers[name].const_value = ir.tensor(parameter.numpy().copy(), name=name)
    x = torch.randn(1, 5, 6, generator=generator)
    found, = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)


def test_a_traced_graph_names_nothing_of_this_machine() -> None:
    model = Telling().eval()
    graph = trace(Wrapper(model), (torch.zeros(2, 3, 6),), (["x"], ["y"]), ({0: "batch", 1: "rows"},), parameter_names(model))
    data = ir.to_proto(graph).SerializeToString()
    assert not any(text in data for text in (str(Path.home()).encode(), str(ROOT).encode(), b"site-packages", b"line ", Path(__file__).name.encode()))
    assert [str(d) for value in graph.graph.inputs for d in value.shape or ()] == ["batch", "rows", "6"]
