"""Weights in blocks of whole numbers: what is predicted that onnxruntime holds of them, against what a process has in memory that loaded them."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgecomp.ir.graphs import load
from edgecomp.predict.memory import loaded_bytes

WIDTH, ROWS = 4096, 8192
# what the process holds of its own, before and after; the heap's free pages go back first
LOADS = """
import ctypes, json, re, sys
from pathlib import Path
import onnxruntime
def held():
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
small, large = (Path(sys.argv[1]) / name for name in ("small.onnx", "large.onnx"))
first = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
before = held()
second = onnxruntime.InferenceSession(large, providers=["CPUExecutionProvider"])
print(json.dumps(held() - before))
"""


def quantized_product(bits: int, block: int, rows: int) -> ir.Model:
    """A product with a weight [rows, WIDTH] as the onnxruntime dialect writes it: the highest bits are flipped when it is loaded."""
    shape, blocks = (rows, WIDTH // block, block * bits // 8), (rows, WIDTH // block)
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
product (float[1,{WIDTH}] x, uint8[{",".join(map(str, shape))}] numbers, float16[{",".join(map(str, blocks))}] halves) => (float[1,{rows}] y) {{
  highest = Constant <value = uint8[1] {{{0x88 if bits == 4 else 0x80}}}> ()
  flipped = BitwiseXor (numbers, highest)
  scales = Cast <to = 1> (halves)
  y = com.microsoft.MatMulNBits <K = {WIDTH}, N = {rows}, bits = {bits}, block_size = {block}, accuracy_level = 4> (x, flipped, scales)
}}""")
    random = np.random.default_rng(0)
    for name, array in (("numbers", random.integers(0, 256, shape, np.uint8)), ("halves", random.random(blocks).astype(np.float16))):
        value, = [value for value in model.graph.inputs if value.name == name]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's own pages")
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 32), (4, 128)])
def test_quantized_weights_take_what_a_process_holds_of_them(bits: int, block: int, tmp_path: Path) -> None:
    for name, rows in (("small", 16), ("large", ROWS)):
        ir.save(quantized_product(bits, block, rows), tmp_path / f"{name}.onnx", external_data=f"{name}.bin")
    held = json.loads(subprocess.run([sys.executable, "-c", LOADS, tmp_path], check=True, capture_output=True, text=True).stdout)
    assert loaded_bytes(load(tmp_path / "large.onnx")) == pytest.approx(held, rel=0.1)
