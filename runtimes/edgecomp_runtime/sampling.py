"""Picking the next token: greedy, or drawn at a temperature from the likeliest tokens."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgecomp_runtime.errors import BundleError, InputError


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens.

    temperature: 0 takes the likeliest token; above it, logits are divided by it and a token is drawn.
    top_p: drawing is among the fewest likeliest tokens whose probability reaches this.
    seed: the same seed gives the same tokens; None draws anew each time.

    Raises InputError where a value is out of range, or where it has no effect because the temperature is 0.
    """
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature {self.temperature} is out of range: 0 is greedy, 0.2 to 1 is usual")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is out of range: give one above 0 and up to 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed {self.seed} is negative: give 0 or more")
        if self.temperature == 0:
            idle = [f"{name} {value}" for name, value, default in [("top_p", self.top_p, 1.0), ("seed", self.seed, None)]
                    if value != default]
            if idle:
                raise InputError(f"no effect at temperature 0, which is greedy: {', '.join(idle)}; "
                                 "leave it out or give a temperature above 0")


def sampler(sampling: Sampling) -> Callable[[np.ndarray], int]:
    """A function from logits [vocabulary], float16 or float32, to a token id; between equals, greedy takes the lowest id.

    The function raises BundleError where no logit is finite or one is NaN: the model has overflowed.
    """
    if sampling.temperature == 0:
        return _likeliest
    generator = np.random.default_rng(sampling.seed)

    def draw(logits: np.ndarray) -> int:
        ids, probabilities = distribution(logits, sampling.temperature, sampling.top_p)
        reached = probabilities.cumsum()
        return int(ids[np.searchsorted(reached, generator.random() * reached[-1], side="right")])

    return draw


def distribution(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The ids that can be drawn and their probabilities, which sum to 1 (both [kept], the latter float64).

    A token is kept while those likelier than it fall short of `top_p`, as in Hugging Face's TopPLogitsWarper; so one always is.
    """
    highest = float(logits[_likeliest(logits)])
    with np.errstate(over="ignore"):  # at a tiny temperature all but the highest go to -inf, which is right
        weights = np.exp((logits.astype(np.float64) - highest) / temperature)
    probabilities = weights / weights.sum()
    ids = np.arange(len(probabilities))
    if top_p < 1:
        # All tokens below this line together hold less than 1 - top_p, so none of them stays. Sorting only the others
        # saves most of the time with vocabularies of 150,000, of which few hundred matter.
        ids = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        ids = ids[probabilities[ids].cumsum() - probabilities[ids] < top_p]
    kept = probabilities[ids]
    return ids, kept / kept.sum()


def _likeliest(logits: np.ndarray) -> int:
    token = _highest_half(logits) if logits.dtype == np.float16 else int(np.argmax(logits))  # the first NaN, if there is one
    if not np.isfinite(logits[token]):
        raise BundleError(f"the highest logit is {logits[token]} (token {token} of {len(logits)}): "
                          "the model overflows; compile it with another precision")
    return token


def _highest_half(logits: np.ndarray) -> int:
    """What np.argmax gives. It compares half floats slowly (300 us for a vocabulary of 32,000), whole numbers in the same order fast (50 us)."""
    bits = logits.view(np.int16)
    order = bits ^ (bits >> 15 & 0x7FFF)
    token = int(order.argmax())
    odd = order[token] in (0, -1) or order[token] > 0x7C00 or order.min() < ~0x7C00  # two zeros, which are equal; NaNs
    return int(np.argmax(logits)) if odd else token
