"""What each TensorRT release takes of an ONNX graph, with sources; and what it refuses of one."""
from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgecomp.dialects.plain_operators import REDUCTIONS, type_of
from edgecomp.ir.rewrite import dims, inputs, nodes

IN_BLOCKS = 21  # the opset since which DequantizeLinear has blocks
SIXTEEN = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PARSER = "https://github.com/onnx/onnx-tensorrt"
_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt"
_CHANGES = f"{_PARSER}/blob/0137504e2b25fe5253bd85d26b073378fb67805b/docs/Changelog.md"  # 8.6 to 10.6
_ATTENTION = f"{_DOCS}/latest/inference-library/transformers-fused-attention.html"
_CACHE = f"{_DOCS}/latest/inference-library/transformers-kv-cache.html"

# docs/operators.md of 8.5, and what the change log of 8.6 adds
_NAMES_8_6 = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape
    Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity If
    InstanceNormalization IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
    Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor GroupNormalization LayerNormalization IsInf"""
_OPERATORS_8_6 = frozenset(_NAMES_8_6.split())
_OPERATORS_10_3 = _OPERATORS_8_6 | {"Hardmax", "DeformConv"}  # the change log names no others; opset 20's Gelu is in no table seen
_OPERATORS_10_13 = _OPERATORS_10_3 | {"STFT", "BlackmanWindow", "HammingWindow", "HannWindow"}
# docs/operators.md of 10.15
_OPERATORS_10_16 = _OPERATORS_10_13 | {"Attention", "CastLike", "Gelu", "Mish", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
_OPERATORS_RTX_1_7 = (_OPERATORS_10_16 | {"Swish", "LinearAttention", "CausalConvWithState"}) - {"DeformConv"}  # OnnxParser.supports_operator


@dataclass(frozen=True)
class Target:
    """One release, as the dialect of this name is lowered for.

    opset: of the written model. operators: of ONNX's own domain, that the parser imports. int64: has the type; without it, inputs and
    outputs are int32. bf16, fp8, fp4: types of a strongly typed network; int4: of weights, in blocks with a scale each; int8_blocks: the same
    of int8.
    strongly_typed: networks compute in the types that the graph says. most_topk: k of TopK.
    heads: widths for which the Attention operator has kernels, in 16-bit types alone. sources: of the row, each a page or what was tried.
    """
    name: str
    opset: int
    operators: frozenset[str]
    int64: bool
    strongly_typed: bool
    bf16: bool
    fp8: bool
    int4: bool
    fp4: bool
    sources: tuple[str, ...]
    int8_weights: bool = True  # constants that DequantizeLinear reads with a scale a row
    int8_blocks: bool = False  # the page on DequantizeLinear of the first releases that know blocks names int4 alone
    most_topk: int = 3840  # https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html; RTX 1.7 fails to build 3841
    heads: range = range(16, 257, 8)  # RTX 1.7 builds these for all of its GPUs, and fails to build 8, 12, 20, 36, 68, 264 and 288

    @property
    def attention(self) -> bool:
        """Has the Attention operator; `fuses` says for which."""
        return "Attention" in self.operators

    @property
    def in_place(self) -> bool:
        """Updates a cache where it lies, by TensorScatter."""
        return "TensorScatter" in self.operators

    @property
    def norms(self) -> bool:
        """Has RMSNormalization."""
        return "RMSNormalization" in self.operators

    @property
    def rotary(self) -> bool:
        """Has RotaryEmbedding."""
        return "RotaryEmbedding" in self.operators

    def fuses(self, dtype: ir.DataType | None, width: int, softcap: float) -> bool:
        """Whether the Attention operator is taken for queries of a type and heads of a width: it is not in fp32, nor with a soft cap."""
        return self.attention and dtype in SIXTEEN and width in self.heads and not softcap


TARGETS = {target.name: target for target in (
    Target("tensorrt-8.6", 17, _OPERATORS_8_6, int64=False, strongly_typed=False, bf16=False, fp8=False, int4=False, fp4=False,
           int8_weights=False, sources=(f"{_PARSER}/blob/6d0ab7be324d02c7feb3a306b6fdbeae84f71ddc/docs/operators.md", _CHANGES,
                                        "https://github.com/megvii-research/Sparsebit/issues/16: what 8.2 says of such a weight")),
    # 10.0's operators.md says opset 20
    Target("tensorrt-10.3", 20, _OPERATORS_10_3, int64=True, strongly_typed=True, bf16=True, fp8=True, int4=True, fp4=False, sources=(
        _CHANGES, f"{_DOCS}/operators/docs/Dequantize.html", "tensorrt.so of PyPI's 10.3.0: no add_attention, no add_kv_cache_update")),
    Target("tensorrt-10.13", 20, _OPERATORS_10_13, int64=True, strongly_typed=True, bf16=True, fp8=True, int4=True, fp4=True, sources=(
        _CHANGES, f"{_PARSER}/pull/1043", f"{_PARSER}/pull/1048", "tensorrt.so of PyPI's 10.13.3.9: no add_attention, no add_kv_cache_update")),
    Target("tensorrt-10.16", 24, _OPERATORS_10_16, int64=True, strongly_typed=True, bf16=True, fp8=True, int4=True, fp4=True, sources=(
        f"{_PARSER}/pull/1043", f"{_PARSER}/pull/1048", f"{_DOCS}/10.16.1/_static/operators/Attention.html", _ATTENTION, _CACHE)),
    Target("tensorrt-11.4", 24, _OPERATORS_10_16 | {"Swish"}, int64=True, strongly_typed=True, bf16=True, fp8=True, int4=True, fp4=True,
           int8_blocks=True, sources=(
        f"{_PARSER}/pull/1054", f"{_DOCS}/11.1.0/_static/operators/Attention.html", f"{_DOCS}/latest/_static/operators/KVCacheUpdate.html",
        f"{_DOCS}/11.0.0/inference-library/work-quantized-types.html", f"{_DOCS}/latest/_static/operators/Quantize.html")),
    Target("tensorrt-rtx-1.7", 24, _OPERATORS_RTX_1_7, int64=True, strongly_typed=True, bf16=True, fp8=True, int4=True, fp4=True,
           int8_blocks=True, sources=(
        "tensorrt_rtx 1.7.1.116: graphs parsed and engines built", "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/"
        "support-matrix-1/1.5.html")),
)}

NO_GRAPH = ("NonZero", "NonMaxSuppression", "Loop", "Scan", "If")


def refused(model: ir.Model, target: Target) -> list[str]:
    """What a target does not take of a graph, each with the reason; nothing is found in a graph that was lowered for it."""
    found = []
    if model.graph.opset_imports.get("", 0) > opset_for(model, target):
        found.append(f"opset {model.graph.opset_imports['']}: {target.name} is written in {target.opset}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.INT64 and not target.int64:
            found.append(f"{value.name}: int64, which {target.name} has not")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        check = _CHECKS.get(node.op_type)
        if why := _foreign(node, target) or (check(node, target) if check else ""):
            found.append(f"{node.op_type}: {why}")
    types = {value.dtype for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs)}
    for dtype, taken in ((ir.DataType.BFLOAT16, target.bf16), (ir.DataType.FLOAT8E4M3FN, target.fp8), (ir.DataType.INT4, target.int4),
                         (ir.DataType.FLOAT4E2M1, target.fp4)):
        if dtype in types and not taken:
            found.append(f"{dtype.name}: a type that {target.name} has not")
    return found


def opset_for(model: ir.Model, target: Target) -> int:
    """What a model is written in for a target: no opset before 21 has blocks of a weight, and a release that takes them reads them as 21 has them."""
    in_blocks = any("block_size" in node.attributes for node in nodes(model, "DequantizeLinear"))
    return max(target.opset, IN_BLOCKS) if in_blocks else target.opset


def _foreign(node: ir.Node, target: Target) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"of the domain {node.domain}, not ONNX's own"
    if node.op_type not in target.operators:
        return f"not among the operators of {target.name}"
    return "its shapes or its course depend on numbers, so that no CUDA graph can be captured around it" if node.op_type in NO_GRAPH else ""


def _scatter(node: ir.Node, target: Target) -> str:
    reduction = node.attributes.get_string("reduction", "none")
    return f"with the reduction {reduction}" if reduction != "none" else ""


def _topk(node: ir.Node, target: Target) -> str:
    count = ir.convenience.get_const_tensor(inputs(node)[1])
    if count is None:
        return "of a number that is no constant"
    return f"of {count.numpy().item()}, more than {target.most_topk}" if count.numpy().item() > target.most_topk else ""


def _attention(node: ir.Node, target: Target) -> str:
    query, key = inputs(node)[:2]
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return "with a cache or more than one result"
    if softcap := node.attributes.get_float("softcap", 0.0):
        return f"with the soft cap {softcap}"
    if query.shape is None or len(query.shape) != 4 or (key.shape is not None and len(key.shape) != 4):
        return "of queries or keys that are not known to have four axes"
    if (dtype := type_of(query)) not in SIXTEEN:
        return f"in {dtype.name}, for which there is no kernel"
    width = dims(query)[3]
    return f"of heads {width} wide, for which there is no kernel" if width not in target.heads else ""


def _update(node: ir.Node, target: Target) -> str:
    cache, out = inputs(node)[0], node.outputs[0]
    if cache.shape is None or len(cache.shape) != 4 or not isinstance(cache.shape[2], int) or not cache.is_graph_input() or not out.is_graph_output():
        return "of a cache that is no input and output of the graph with four axes and a fixed number of rows"
    return "along another axis than the rows" if node.attributes.get_int("axis", -2) != -2 else ""


def _reduction(node: ir.Node, target: Target) -> str:
    dtype = ir.DataType.INT64 if target.int64 else type_of(inputs(node)[0])
    return "of whole numbers" if not target.int64 and dtype.is_integer() else ""


def _blocks(node: ir.Node, target: Target) -> str:
    numbers = inputs(node)[0]
    # https://docs.pytorch.org/TensorRT/tutorials/_rendered_examples/dynamo/torchao/quantize_linear_int4_woq.html: IDequantizeLayer rejects such
    if "block_size" in node.attributes and len(inputs(node)) > 2:
        return (f"{numbers.name} has zeros other than 0, which {target.name} does not take: compile a checkpoint that was quantized around zero "
                "(GPTQ with sym), or one in bf16, fp16 or fp32, and quantize its bundle")
    if "block_size" not in node.attributes:
        return "" if target.int8_weights or not numbers.is_initializer() else (
            f"{numbers.name} is in int8, which {target.name} is not known to take: use the bundle that was quantized")
    if (target.int4 if numbers.dtype == ir.DataType.INT4 else target.int8_blocks):
        return ""
    taken = ("takes blocks of int4 alone: quantize with --weights int4 --unquantized 'lm_head.*'" if target.int4 else
             "takes none: use the bundle that was quantized")
    return f"{numbers.name} is in blocks of {type_of(numbers).name.lower()}, and {target.name} {taken}"


_CHECKS = {"DequantizeLinear": _blocks, "ScatterElements": _scatter, "ScatterND": _scatter, "TopK": _topk, "Attention": _attention,
           "TensorScatter": _update, **dict.fromkeys((*REDUCTIONS, "ReduceSum"), _reduction)}
