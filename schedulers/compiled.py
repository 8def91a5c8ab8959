"""Compiles what a search runs millions of times, where numba is installed, as it is with the package.

A machine without it (numba's wheels are large, and some clusters have no network) plans with the same code
interpreted: the same plans for as many tries, a hundred times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:
    numba: Any = None

_F = TypeVar("_F", bound=Callable[..., Any])
COMPILED = numba is not None


def compiled(function: _F) -> _F:
    """The function as machine code, which is kept on the disk."""
    return numba.njit(function, cache=True) if numba is not None else function
