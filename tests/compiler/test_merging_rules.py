"""VisionZip and ToMe against plain loops in torch float64, written from the rules."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from method_harness import Case, run

from edgecomp import methods
from edgecomp.methods.base import DOMAIN, BudgetError, Place
from edgecomp.methods.tome import schedule
from edgecomp.passes.merge_layers import merging
from edgecomp_runtime.errors import EdgecompError


def cosines(rows: torch.Tensor) -> list[list[float]]:
    """Of all rows [S, d] to each other."""
    found: list[list[float]] = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).tolist()
    return found


# VisionZip

def visionzip(x: torch.Tensor, attention: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int,
              mean: bool) -> tuple[list[int], torch.Tensor]:
    """Places, ascending, and tokens of one picture."""
    alike = cosines(keys)
    ranked = sorted(range(len(x)), key=lambda i: (-attention[i].item(), i))
    rest = sorted(ranked[dominant:])
    tokens = {i: x[i] for i in ranked[:dominant]}
    targets = rest[::max(1, len(rest) // contextual)][:contextual] if contextual else []
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest if targets else []:
        if i not in targets:
            members[max(targets, key=lambda target: alike[i][target])].append(i)
    for target, joined in members.items():
        tokens[target] = x[target]
        if joined and mean:
            tokens[target] = torch.stack([x[i] for i in [target, *joined]]).mean(0)
        elif joined:
            tokens[target] = x[target] + torch.stack([x[i] for i in joined]).mean(0)
    places = sorted(tokens)
    return places, torch.stack([tokens[i] for i in places])


@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize(("keep", "share", "dominant"), [
    (64, 84.375, 54), (128, 84.375, 108), (192, 84.375, 162),  # the authors' splits
    (64, 0, 0), (64, 100, 64), (1, 84.375, 1), (500, 50, 250), (575, 10, 58)])
def test_visionzip_is_the_plain_loop(keep: int, share: float, dominant: int, mean: int) -> None:
    generator = np.random.default_rng(keep)
    x, keys = (generator.standard_normal((2, 576, width)).astype(np.float32) for width in (6, 4))
    attention = generator.random((2, 576)).astype(np.float32)
    place = Place((24, 24), keep, "encoder")
    tokens, kept, order = run(Case(methods.make("visionzip", share=share, mean=mean), place, (x, attention, keys)))
    for picture in range(2):
        given = [torch.from_numpy(values[picture]).double() for values in (x, attention, keys)]
        places, expected = visionzip(*given, dominant, keep - dominant, bool(mean))
        assert kept[picture].tolist() == places
        np.testing.assert_allclose(tokens[picture], expected, atol=1e-5, rtol=0)
        assert order[picture, :dominant].tolist() == sorted(range(576), key=lambda i: (-attention[picture, i], i))[:dominant]


def test_visionzips_contextual_tokens_are_about_twice_as_long_as_their_mean() -> None:
    """The difference between the authors' code and an average, on tokens that are all alike."""
    x = np.ones((1, 16, 6), np.float32)
    attention = np.linspace(1, 0, 16, dtype=np.float32)[None]
    place, keys = Place((4, 4), 4, "encoder"), np.ones((1, 16, 4), np.float32)
    longer, _, _ = run(Case(methods.make("visionzip", share=50), place, (x, attention, keys)))
    even, _, _ = run(Case(methods.make("visionzip", share=50, mean=1), place, (x, attention, keys)))
    assert longer[0, :, 0].tolist() == [1, 1, 2, 1]  # all go to the first of two equal targets
    assert even[0, :, 0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("wrong", [{"share": -1}, {"share": 101}, {"mean": 2}, {"columns": -1}])
def test_visionzip_refuses_parameters_without_meaning(wrong: dict[str, int]) -> None:
    with pytest.raises(EdgecompError, match=f"visionzip's {next(iter(wrong))}.*not {next(iter(wrong.values()))}"):
        methods.make("visionzip", **wrong)


# ToMe

def tome(x: torch.Tensor, metric: torch.Tensor, size: torch.Tensor, places: list[int], remove: int,
         cls: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """One round: tokens, sizes and places of one picture."""
    alike = cosines(metric)
    evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {a: max(odds, key=lambda b: alike[a][b]) for a in evens}
    ranked = sorted(evens, key=lambda a: (np.inf if cls and a == 0 else -alike[a][best[a]], a))
    stay = sorted(ranked[remove:]) if cls else ranked[remove:]
    groups = [[a] for a in stay] + [[b] + [a for a in ranked[:remove] if best[a] == b] for b in odds]
    total = torch.stack([sum(size[i] for i in group) for group in groups])  # type: ignore[arg-type]
    mean = torch.stack([sum(x[i] * size[i] for i in group) / sum(size[i] for i in group) for group in groups])  # type: ignore[arg-type]
    return mean, total, [min(places[i] for i in group) for group in groups]


@pytest.mark.parametrize(("rows", "remove", "cls"), [
    (577, 64, True), (577, 288, True), (576, 64, False), (576, 288, False), (12, 5, True), (13, 6, False), (13, 1, True), (2, 1, False),
    (3, 1, True)])
def test_a_round_of_tome_is_the_plain_loop(rows: int, remove: int, cls: bool) -> None:
    generator = np.random.default_rng(rows + remove)
    x = generator.standard_normal((2, rows, 5)).astype(np.float32)
    keys = generator.standard_normal((2, 3, rows, 4)).astype(np.float32)  # three heads
    size = generator.integers(1, 9, (2, rows, 1)).astype(np.float32)
    places = np.stack([generator.permutation(rows * 4)[:rows] for _ in range(2)]).astype(np.float32)
    function = merging(rows, remove, cls)
    shapes = {"x": [rows, 5], "keys": [3, rows, 4], "size": [rows, 1], "places": [rows]}
    inputs = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["images", *shape])) for name, shape in shapes.items()]
    call = ir.node(function.name, inputs, domain=DOMAIN, num_outputs=4)
    for value, name in zip(call.outputs, ("merged", "sizes", "at", "bias")):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, call.outputs, nodes=[call], opset_imports={"": 23, DOMAIN: 1}, name="round")
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString())
    merged, sizes, at, bias = session.run(None, {"x": x, "keys": keys, "size": size, "places": places})
    for n in range(2):
        given = [torch.from_numpy(values[n]).double() for values in (x, keys, size)]
        tokens, total, first = tome(given[0], given[1].mean(0), given[2], places[n].tolist(), remove, cls)
        np.testing.assert_allclose(merged[n], tokens, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(sizes[n], total)
        assert at[n].tolist() == first
        np.testing.assert_allclose(bias[n], np.log(total.numpy()[:, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [64, 192, 100, 400])
def test_tome_at_the_projector_is_the_round_repeated(keep: int) -> None:
    generator = np.random.default_rng(keep)
    x, keys = (generator.standard_normal((1, 576, width)).astype(np.float32) for width in (6, 4))
    tokens, kept, _ = run(Case(methods.make("tome"), Place((24, 24), keep, "projector"), (x, keys)))
    both = torch.from_numpy(np.concatenate([x[0], keys[0]], 1)).double()
    size, places = torch.ones(576, 1, dtype=torch.float64), list(range(576))
    halvings = next(n for n in range(10) if keep * 2**n >= 576)
    for remove in schedule(halvings, 576, keep):
        both, size, places = tome(both, both[:, 6:], size, places, remove, False)
    rank = np.argsort(places)
    assert kept[0].tolist() == np.array(places)[rank].tolist()
    np.testing.assert_allclose(tokens[0], both[rank, :6], atol=1e-5, rtol=0)
    assert size.sum() == 576


@pytest.mark.parametrize("layers", range(1, 11))
def test_a_schedule_reaches_every_budget_that_halving_can(layers: int) -> None:
    for tokens in (1, 2, 9, 25, 37, 576, 577, 729):
        for keep in range(1, tokens + 1):
            least = tokens
            for _ in range(layers):
                least -= least // 2
            if keep < least:
                with pytest.raises(BudgetError, match=f"leave at least {least} of {tokens}, not {keep}"):
                    schedule(layers, tokens, keep)
                continue
            left = tokens
            for remove in (removed := schedule(layers, tokens, keep)):
                assert 0 <= remove <= left // 2
                left -= remove
            assert left == keep and len(removed) == layers


def test_a_schedule_is_even_where_it_can_be() -> None:
    assert schedule(8, 576, 64) == [64] * 8
    assert schedule(3, 576, 190) == [128, 129, 129]
    assert schedule(4, 64, 6) == [16, 24, 12, 6]  # halving at the end; an even share is 14 or 15
