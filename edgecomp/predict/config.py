"""Numbers of a Hugging Face config.json, looked at before anything is computed from them."""
from __future__ import annotations

from typing import Any

from edgecomp_runtime.errors import EdgecompError

Config = dict[str, Any]
MOST = 10**7 - 1  # tokens of a vocabulary or numbers of a row, forty times the largest that are trained
LAYERS = 1000


def number(config: Config, name: str, most: int = MOST) -> int:
    """A positive whole number. Raises EdgecompError where it is missing or absurd."""
    value = config.get(name)
    if value is None:
        raise EdgecompError(f"config: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise EdgecompError(f"config: {name} is {value!r:.60}, where a whole number from 1 to {most} is expected")
    return value


def optional(config: Config, name: str, default: int) -> int:
    """The same of a number that may be missing, null or 0, and is `default` then."""
    value = config.get(name)
    return default if value is None or (value == 0 and isinstance(value, int)) else number(config, name)


def ratio(config: Config, name: str, default: float) -> float:
    """A positive number that need not be whole, `default` where it is missing. Raises EdgecompError where it is absurd."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-3 <= value <= 1e3:
        raise EdgecompError(f"config: {name} is {value!r:.60}, where a number from 0.001 to 1000 is expected")
    return float(value)


def side(config: Config, name: str) -> int:
    """A length in pixels; the first of two, where a config has height and width."""
    value = config.get(name)
    return number({name: value[0] if isinstance(value, list) and value else value}, name)


def text(config: Config, name: str) -> str:
    """A name; '' where it is missing. Raises EdgecompError where it is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise EdgecompError(f"config: {name} is {value!r:.60}, where a name is expected")
    return value or ""


def listed(config: Config, name: str) -> list[Any]:
    """A list; empty where it is missing."""
    value = config.get(name)
    if value is not None and not isinstance(value, list):
        raise EdgecompError(f"config: {name} is {value!r:.60}, where a list is expected")
    return value or []
