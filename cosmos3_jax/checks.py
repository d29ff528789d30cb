"""Numbers from outside, of whatever library, as Python's own; InputError for what is none, or out of range."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from cosmos3_jax.errors import InputError, shown


def in_range(
    settings: Any, least: Mapping[str, int], most: Mapping[str, int], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Those fields of a dataclass that are whole numbers (`least`, `most`) or numbers (`ranges`), by name, as Python's own.

    None stays where it is the default. Raises InputError for the first that cannot be used.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    checked: dict[str, Any] = {}
    for name in (*least, *ranges):
        value = getattr(settings, name)
        if value is None and defaults[name] is None:
            checked[name] = None
        elif name in ranges:
            checked[name] = real(name, value, *ranges[name])
        else:
            checked[name] = whole(name, value, least[name], most.get(name, math.inf))
    return checked


def whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """A whole number of at least `least`, and at most `most`. Raises InputError for anything else, True and 1.0 too."""
    number = number_or_none(int, value)
    if number is None or number < least:
        raise InputError(f"{name}={shown(value)}: a whole number of at least {least} is expected")
    if number > most:
        raise InputError(f"{name}={shown(value)}: at most {most} is possible")
    return number


def real(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`. Raises InputError for anything else, True and NaN too."""
    number = number_or_none(float, value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name}={shown(value)}: a number from {low} to {high} is expected")
    return number


def number_or_none(kind: type, value: Any) -> Any:
    """A number as an int or a float, the `kind` that is wanted; None for what is none, or has no place in a float."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return None
    try:
        return value if type(value) in (int, float) else kind(value)
    except Exception:  # too large for a float; whatever somebody else's type does
        return None
