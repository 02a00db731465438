"""Positions of M-RoPE numbered anew behind a cut: only the graph knows which of a picture's rows and columns nothing is left of."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgecomp.passes.tape import Tape

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class Anew:
    """Positions of the kept tokens [axes, B, I, K], those of all rows as text has them [axes, B, S], and what each picture gave up [I].

    A picture's rows and columns close up on each axis, and what follows it moves up by as much as its highest place went down: what
    the host does for steps in front of the decoder.
    """
    kept: ir.Value
    rows: ir.Value
    saved: ir.Value

    @staticmethod
    def of(tape: Tape, positions: ir.Value, arriving: ir.Value, staying: ir.Value, tokens: int) -> Anew:
        """Numbers a prompt's rows anew.

        Args:
            tape: of the graph.
            positions: of the rows [axes, B, S].
            arriving: of each picture's tokens [axes, B, I, N]; on each axis no place is left out.
            staying: of those that are kept [axes, B, I, K].
            tokens: N, which is more than any place on any axis.
        """
        whole = tape.ints([0, -1])  # a picture's: over axes and tokens
        places = tape.ints(np.arange(tokens))
        start = tape.add("ReduceMin", arriving, whole, keepdims=1)  # [1, B, I, 1]
        offset = tape.add("Unsqueeze", tape.add("Sub", staying, start), tape.ints([-1]))  # [axes, B, I, K, 1]
        used = tape.add("ReduceMax", _ones(tape, "Equal", offset, places), tape.ints([-2]), keepdims=1)  # [axes, B, I, 1, N]
        below = tape.add("ReduceSum", tape.add("Mul", used, _ones(tape, "Less", places, offset)), tape.ints([-1]), keepdims=0)
        rank = tape.add("Cast", below, to=INT64)
        highest = tape.add("Add", tape.add("ReduceMax", rank, whole, keepdims=1), start)
        saved = tape.add("Sub", tape.add("ReduceMax", arriving, whole, keepdims=1), highest)  # [1, B, I, 1]

        def earlier(of: ir.Value) -> ir.Value:
            """What pictures before these positions [.., 1] gave up."""
            here, given = (tape.add("Transpose", value, perm=[0, 1, 3, 2]) for value in (start, saved))  # [1, B, 1, I]
            return tape.add("ReduceSum", tape.add("Where", tape.add("Less", here, of), given, tape.ints(0)), tape.ints([-1]), keepdims=1)
        kept = tape.add("Sub", tape.add("Add", rank, start), earlier(start))
        column = tape.add("Unsqueeze", positions, tape.ints([-1]))
        rows = tape.add("Squeeze", tape.add("Sub", column, earlier(column)), tape.ints([-1]))
        return Anew(kept, rows, tape.add("Reshape", saved, tape.ints([-1])))


def _ones(tape: Tape, comparison: str, left: ir.Value, right: ir.Value) -> ir.Value:
    """1 where it holds, else 0."""
    return tape.add("Cast", tape.add(comparison, left, right), to=FLOAT)
