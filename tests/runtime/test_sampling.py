"""Sampling against transformers' logits warpers, by its frequencies, and by what it refuses."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from edgecomp_runtime.errors import BundleError, InputError
from edgecomp_runtime.sampling import Sampling, distribution, sampler

DRAWS = 20_000
TEMPERATURES = st.floats(0.1, 3)
TOP_PS = st.floats(0.01, 1)
LOGITS = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-12, 12, width=32), unique=True)


def warped(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The probabilities [vocabulary] that transformers draws from, computed in float64 so that roundings do not meet top_p."""
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None], dtype=torch.float64))
    return TopPLogitsWarper(top_p)(None, scores)[0].softmax(-1).numpy()


def spread(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """`distribution` as probabilities [vocabulary]."""
    ids, probabilities = distribution(logits, temperature, top_p)
    assert len(set(ids.tolist())) == len(ids)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    return full


@settings(deadline=None, max_examples=400)
@given(LOGITS, TEMPERATURES, TOP_PS)
def test_kept_tokens_and_probabilities_are_those_of_transformers(logits: np.ndarray, temperature: float, top_p: float) -> None:
    expected = warped(logits, temperature, top_p)
    actual = spread(logits, temperature, top_p)
    if ((expected > 0) != (actual > 0)).any():  # only where a sum meets top_p to the last digits may the sides differ
        mass = np.sort(warped(logits, temperature, 1.0))[::-1].cumsum()
        assert np.abs(mass - top_p).min() < 1e-12
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.45, 1), (0.6, 2), (0.9, 3), (0.97, 4), (1.0, 5)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    logits = np.log(np.array([0.05, 0.5, 0.02, 0.25, 0.18], np.float32))
    assert np.count_nonzero(spread(logits, 1.0, top_p)) == kept == np.count_nonzero(warped(logits, 1.0, top_p))


def test_a_vocabulary_of_real_size_keeps_what_transformers_keeps() -> None:
    logits = np.random.default_rng(0).normal(0, 4, 150_000).astype(np.float32)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        np.testing.assert_allclose(spread(logits, 0.7, top_p), warped(logits, 0.7, top_p), rtol=1e-9, atol=1e-15)


def test_without_top_p_every_token_can_be_drawn() -> None:
    logits = np.array([30, 0, -5], np.float32)
    assert (spread(logits, 1.0, 1.0) > 0).all()


def test_tokens_that_were_ruled_out_stay_out() -> None:
    pick = sampler(Sampling(temperature=2.0, seed=0))
    logits = np.array([-np.inf, 1, -np.inf, 1, -np.inf], np.float16)
    assert {pick(logits) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.8)])
def test_frequencies_are_the_probabilities_of_transformers(temperature: float, top_p: float) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.0, 1.5], np.float32)
    pick = sampler(Sampling(temperature, top_p, seed=7))
    frequencies = np.bincount([pick(logits) for _ in range(DRAWS)], minlength=5) / DRAWS
    expected = warped(logits, temperature, top_p)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / DRAWS)
    assert (frequencies[expected == 0] == 0).all()


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = np.random.default_rng(1).normal(size=(50, 100)).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        pick = sampler(Sampling(temperature=1.0, seed=seed))
        return [pick(row) for row in logits]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


@given(arrays.arrays(np.float16, st.integers(1, 50), elements=st.sampled_from([-3.0, -0.5, -0.0, 0.0, 2.0, float("-inf"), 7.0])
                     ).filter(lambda a: np.isfinite(a).any()))
@example(np.array([-1, -0.0, 0.0], np.float16))
def test_greedy_takes_the_first_of_the_highest(logits: np.ndarray) -> None:
    values = logits.tolist()
    assert sampler(Sampling())(logits) == values.index(max(values))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tiny_temperature_is_nearly_greedy_without_warning(dtype: type[np.floating]) -> None:
    logits = np.array([1, 4, 3.99, -20], dtype)
    with np.errstate(all="raise", under="ignore"):
        assert {sampler(Sampling(temperature=5e-324))(logits) for _ in range(20)} == {1}


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9, 0)])
def test_logits_of_an_overflown_model_are_refused(sampling: Sampling, bad: float) -> None:
    with pytest.raises(BundleError, match=rf"the highest logit is {bad} \(token 2 of 4\).*another precision"):
        sampler(sampling)(np.array([0, 9, bad, 1], np.float16))


def test_logits_that_are_all_ruled_out_are_refused() -> None:
    with pytest.raises(BundleError, match="the highest logit is -inf"):
        sampler(Sampling())(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -0.1}, "temperature -0.1 is out of range"),
    ({"temperature": float("nan")}, "temperature nan is out of range"),
    ({"temperature": float("inf")}, "temperature inf is out of range"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0 is out of range"),
    ({"temperature": 1.0, "top_p": 1.1}, "top_p 1.1 is out of range"),
    ({"temperature": 1.0, "top_p": float("nan")}, "top_p nan is out of range"),
    ({"temperature": 1.0, "seed": -1}, "seed -1 is negative"),
    ({"top_p": 0.9}, "no effect at temperature 0, which is greedy: top_p 0.9;"),
    ({"seed": 0}, "no effect at temperature 0, which is greedy: seed 0;"),
    ({"top_p": 0.5, "seed": 1}, "no effect at temperature 0, which is greedy: top_p 0.5, seed 1;"),
])
def test_options_out_of_range_or_without_effect_are_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
