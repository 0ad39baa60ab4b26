"""Cases that plain `pytest` leaves to CI: `parametrize("x", [quick, *slow(long, longer)])`."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """A tuple is the values of several names."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
