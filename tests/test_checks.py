"""Numbers from outside: of any library, in a range, and nothing that only looks like one."""

import dataclasses
import decimal
import fractions
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax.checks import in_range, real, whole
from cosmos3_jax.errors import InputError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_any_library_are_pythons_own(value):
    assert whole("steps", value, 1) == 3
    assert type(whole("steps", value, 1)) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, "3", None, [3], jnp.ones(2), fractions.Fraction(3), 0, -1])
def test_what_is_no_whole_number_of_the_range_is_refused(value):
    with pytest.raises(InputError, match=r"^steps=.*: a whole number of at least 1 is expected$"):
        whole("steps", value, 1)


def test_the_most_is_told():
    assert whole("seed", 7, 0, 7) == 7
    with pytest.raises(InputError, match=r"^seed=8: at most 7 is possible$"):
        whole("seed", 8, 0, 7)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), fractions.Fraction(1, 2)])
def test_numbers_of_any_library_are_floats(value):
    assert real("ema", value, 0, 1) == 0.5
    assert type(real("ema", value, 0, 1)) is float


@pytest.mark.parametrize(
    "value",
    [True, "0.5", None, float("nan"), float("inf"), -0.1, 1.1, pytest.param(10**5000, id="long"), decimal.Decimal("0.5"), 1j],
)
def test_what_is_no_number_of_the_range_is_refused(value):
    with pytest.raises(InputError, match=r"^ema=.*: a number from 0 to 1 is expected$|^ema=a value of type int: "):
        real("ema", value, 0, 1)


@dataclasses.dataclass
class Settings:
    steps: int = 1
    seed: int | None = None
    ema: float | None = None
    name: str = "none"


def test_fields_of_settings_are_checked_and_none_stays_where_it_is_the_default():
    check = functools.partial(in_range, least={"steps": 1, "seed": 0}, most={"seed": 7}, ranges={"ema": (0, 1)})
    assert check(Settings(np.int64(2))) == {"steps": 2, "seed": None, "ema": None}
    assert check(Settings(seed=7, ema=0.5)) == {"steps": 1, "seed": 7, "ema": 0.5}
    for wrong, sentence in (({"steps": None}, "steps=None: "), ({"seed": 8}, "seed=8: at most 7"), ({"ema": 2}, "ema=2: ")):
        with pytest.raises(InputError, match=f"^{sentence}"):
            check(Settings(**wrong))
