"""Activations from a config alone: a model's layers as the steps that edgecomp's graphs take, planned as a graph's nodes are.

Operators that write over their input (biases, residual sums in a tower) make no step of their own. Recurrences and experts are taken as
wide as their matrices. What a graph makes besides (masks, shapes, rows of logits) is left out.
"""
from __future__ import annotations

from collections.abc import Sequence

from edgecomp.predict.model import Layer, Shape
from edgecomp.predict.planner import Made, Step, most_bytes
from edgecomp.predict.tower import Tower

TABLE_BYTES = 4  # angles are computed in fp32
JOINED_BYTES = 2 * 2**20  # of a weight: edgecomp.dialects.joined


class _Steps:
    """Steps in order. Values are numbers; 0 is what comes from outside."""

    def __init__(self, rows: int, element: int):
        self.rows, self.element = rows, element
        self.steps: list[Step] = []
        self.count = 0

    def add(self, *reads: int, widths: Sequence[float], of: str = "rows", rows: int | None = None, over: bool = False, view: bool = False,
            copied: float = 0.0) -> tuple[int, ...]:
        """Makes a value of so many numbers a row for each of `widths`. `of` tells kinds apart that are alike in size alone."""
        rows = self.rows if rows is None else rows
        made = tuple(Made(self.count + n, (of, rows, width), rows * width * self.element) for n, width in enumerate(widths, 1))
        self.count += len(made)
        self.steps.append(Step(made, reads, reads if over else (), view, copied))
        return tuple(int(value.name) for value in made)  # type: ignore[call-overload]

    def small(self, width: int, widths: list[int]) -> list[int]:
        """Which of the matrices [each of `widths`, width] are small enough to be joined."""
        return [at for at, each in enumerate(widths) if width * each * self.element <= JOINED_BYTES]

    def products(self, value: int, width: int, widths: list[int]) -> list[int]:
        """Products of one value with matrices [each of `widths`, width]; where two or more of these are small, that is one product, taken apart."""
        small = self.small(width, widths)
        if len(small) < 2:
            return [self.one(value, width=each) for each in widths]
        together = self.one(value, width=sum(widths[at] for at in small))
        made = dict(zip(small, self.add(together, widths=[widths[at] for at in small])))
        return [made[at] if at in made else self.one(value, width=each) for at, each in enumerate(widths)]

    def one(self, *reads: int, width: float, of: str = "rows", rows: int | None = None, over: bool = False, view: bool = False) -> int:
        return self.add(*reads, widths=[width], of=of, rows=rows, over=over, view=view)[0]

    def by_heads(self, value: int, width: float) -> int:
        """A norm of each head by itself."""
        apart = self.one(value, width=width, of="heads", view=True)
        return self.one(self.one(apart, width=width, of="heads"), width=width, view=True)

    def attention(self, *reads: int, width: int, key_width: int) -> int:
        return self.add(*reads, widths=[width], copied=self.rows * (width + 2 * key_width) * self.element)[0]


def decoder_bytes(shape: Shape, rows: int, element: int, scores: bool = False) -> float:
    """Bytes of the decoder's activations while it takes so many rows of a prompt at once, `element` bytes a number.

    rows: of all sequences of the batch together. scores: attention computes those of every row with every row.
    """
    plan = _Steps(rows, element)
    widest = max((layer.head_dim for layer in shape.layers if layer.heads), default=0)
    tables = plan.add(0, widths=[widest / 2 * TABLE_BYTES / element] * 2, of="angles") if widest else ()
    state, normed = 0, plan.one(0, width=shape.hidden)
    for layer in shape.layers:
        mixed = _recurrent(plan, layer, normed) if layer.recurrence else _attended(plan, layer, normed, tables, scores) if layer.heads else 0
        if mixed:
            state, normed = plan.add(state, mixed, widths=[shape.hidden] * 2)
        if layer.intermediate:
            state, normed = plan.add(state, _mlp(plan, layer, normed), widths=[shape.hidden] * 2)
    plan.one(normed, width=shape.hidden, rows=1)  # of the row whose logits are asked for
    return most_bytes(plan.steps)


def _attended(plan: _Steps, layer: Layer, normed: int, tables: tuple[int, ...], scores: bool) -> int:
    wide, narrow = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    widths = [wide * (2 if layer.gate else 1), narrow, *([] if layer.shared_value else [narrow])]
    if tables and not (layer.gate or layer.normed or layer.shared_value or scores) and len(plan.small(layer.hidden, widths)) == len(widths):
        packed = plan.one(normed, width=sum(widths))  # attention turns rows itself
        return plan.one(plan.attention(packed, *tables, width=wide, key_width=narrow), width=layer.hidden)
    query, key, *rest = plan.products(normed, layer.hidden, widths)
    gate, value = 0, rest[0] if rest else key
    if layer.gate:
        query, gate = plan.add(query, widths=[wide] * 2)
    if layer.normed:
        query, key = plan.by_heads(query, wide), plan.by_heads(key, narrow)
    query, key = plan.one(query, *tables, width=wide), plan.one(key, *tables, width=narrow)
    out = plan.attention(query, key, value, width=wide, key_width=narrow)
    if scores:
        each = plan.one(query, key, width=layer.heads * plan.rows, of="scores")
        out = plan.one(plan.one(each, width=layer.heads * plan.rows, of="scores"), out, width=wide)
    return plan.one(plan.one(out, gate, width=wide, over=True) if gate else out, width=layer.hidden)


def _recurrent(plan: _Steps, layer: Layer, normed: int) -> int:
    """Everything that the projections make at once, what a convolution makes of it, and the result."""
    across = layer.projections / layer.hidden
    return plan.one(plan.one(plan.one(normed, width=across), width=across), width=layer.hidden)


def _mlp(plan: _Steps, layer: Layer, normed: int) -> int:
    width = layer.intermediate * max(layer.active, 1) + layer.shared
    if layer.matrices == 2:
        return plan.one(plan.one(plan.one(normed, width=width), width=width), width=layer.hidden)  # with its activation
    if width * layer.hidden * plan.element <= JOINED_BYTES:
        gate, up = plan.products(normed, layer.hidden, [width, width])
        return plan.one(plan.one(plan.one(gate, width=width), up, width=width, over=True), width=layer.hidden)
    gate = plan.one(plan.one(normed, width=width), width=width)
    return plan.one(plan.one(gate, plan.one(normed, width=width), width=width, over=True), width=layer.hidden)


def tower_bytes(tower: Tower, visual_tokens: int, hidden: int, element: int) -> float:
    """Bytes of a vision tower's activations over the pictures of so many visual tokens; `hidden` is the decoder's width."""
    patches = tower.patches(visual_tokens)
    plan = _Steps(tower.rows(visual_tokens), element)
    state = _patches(plan, tower, patches)
    kept = {}
    tables = plan.add(0, widths=[tower.rotary] * 2, of="angles") if tower.rotary else ()
    normed = plan.one(state, width=tower.hidden)
    for at in range(1, tower.layers + 1):
        mixed = _mixed(plan, tower, normed, tables)
        if tower.matrices == 3:  # one operator adds and norms
            state, normed = plan.add(state, mixed, widths=[tower.hidden] * 2)
        else:
            state = plan.one(state, mixed, width=tower.hidden, over=True)
            normed = plan.one(state, width=tower.hidden)
        first = plan.one(plan.one(normed, width=tower.intermediate), width=tower.intermediate)
        if tower.matrices == 3:
            first = plan.one(first, plan.one(normed, width=tower.intermediate), width=tower.intermediate, over=True)
        out = plan.one(first, width=tower.hidden)
        last = at == tower.layers
        if tower.matrices == 3:
            state, normed = plan.add(state, out, widths=[tower.hidden] * 2)
        else:
            state = plan.one(state, out, width=tower.hidden, over=True)
            normed = plan.one(state, width=tower.hidden) if not last or tower.joined else state
        if at in tower.taken:
            kept[at] = state
    _projected(plan, tower, [*kept.values(), state if tower.taken and not tower.joined else normed], patches, visual_tokens, hidden)
    return most_bytes(plan.steps)


def _patches(plan: _Steps, tower: Tower, patches: int) -> int:
    """The rows that the first layer takes."""
    if tower.patch_pixels:  # laid out patch by patch, then once for each frame
        pixels = tower.patch_weights // tower.hidden
        laid = plan.one(0, width=tower.patch_pixels - pixels, of="pixels", rows=patches)
        state = plan.one(plan.one(laid, width=pixels, of="frames", rows=patches), width=tower.hidden)
        if tower.taps:  # positions are averages of so many trained ones
            found = plan.one(0, width=tower.taps * tower.hidden, of="taps", rows=patches)
            state = plan.one(state, plan.one(found, width=tower.hidden, of="positions", rows=patches), width=tower.hidden, over=True)
        return state
    convolved = plan.one(plan.one(0, width=tower.hidden, of="convolved", rows=patches), width=tower.hidden, of="patches", rows=patches)
    if not tower.class_row:
        return plan.one(convolved, width=tower.hidden, over=True)
    return plan.one(convolved, width=tower.hidden)


def _mixed(plan: _Steps, tower: Tower, normed: int, tables: tuple[int, ...]) -> int:
    if tower.joined:
        query, key, value = plan.add(plan.one(normed, width=3 * tower.hidden), widths=[tower.hidden] * 3)
    else:
        query, key, value = (plan.one(normed, width=tower.hidden) for _ in range(3))
    if tables:
        query, key = (plan.one(each, *tables, width=tower.hidden) for each in (query, key))
    return plan.one(plan.attention(query, key, value, width=tower.hidden, key_width=tower.hidden), width=tower.hidden)


def _projected(plan: _Steps, tower: Tower, states: list[int], patches: int, tokens: int, hidden: int) -> None:
    """Features of the patches alone, merged, then two products for each token (one in a single step where a family has one)."""
    if tower.class_row:
        states = [plan.one(state, width=tower.hidden, of="patches", rows=patches) for state in states]
    for state in states:
        merged = plan.one(plan.one(state, width=tower.hidden, of="merged", rows=patches) if tower.merge > 1 else state,
                          width=hidden, of="tokens", rows=tokens)
        plan.one(plan.one(merged, width=hidden, of="tokens", rows=tokens), width=hidden, of="out", rows=tokens)
