from fractions import Fraction

import numpy as np
import pytest

from tp_cosep.errors import InputError
from tp_cosep.utils.checks import check_one_of, is_count, is_number


@pytest.mark.parametrize("value", [1, 64, np.int64(3), np.uint8(7)])
def test_counts(value):
    assert is_count(value)
    assert is_number(value)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None, True, False, np.bool_(True), np.int64(0), [1]])
def test_values_that_are_no_counts(value):
    assert not is_count(value)


@pytest.mark.parametrize("value", [0, -1.5, float("inf"), float("nan"), np.float32(0.5), Fraction(1, 3)])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, np.bool_(False), "1", None, 1j, [0.5]])
def test_values_that_are_no_numbers(value):
    assert not is_number(value)


def test_one_of():
    check_one_of("mode", "fast", ("fast", "exact"), "Solver")
    with pytest.raises(InputError, match=r"^Solver: expected mode of \['fast', 'exact'\], got None\.$"):
        check_one_of("mode", None, ("fast", "exact"), "Solver")
