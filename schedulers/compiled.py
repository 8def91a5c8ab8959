"""Compiles functions to machine code when they are first called, and keeps that code on the disk.

It lies beside the sources, under a digest of all in their folder and of this file: numba alone would see a change in
the file of the function called, but not in those that it calls. Where nothing may be written there, numba looks for a
place in the user's cache.

A machine without numba (its wheels are large, and some clusters have no network) plans with the same code interpreted:
the same plans for as many tries, a hundred times slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from inspect import getfile
from pathlib import Path
from typing import Any, TypeVar

try:
    import numba
    import numba.core.config
except ImportError:
    numba: Any = None

COMPILED = numba is not None
_F = TypeVar("_F", bound=Callable[..., Any])


def entry(function: _F) -> _F:
    """A function that Python calls, with all that it calls; other threads run meanwhile. Sums are not re-ordered, so a
    seed decides everywhere."""
    if numba is None:
        return function
    config: Any = numba.core.config
    here = Path(getfile(function)).parent
    sources = [Path(__file__), *sorted(here.glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    given = config.CACHE_DIR
    try:
        for folder in (given, "") if given else (str(here / "__pycache__" / digest), ""):
            config.CACHE_DIR = folder
            try:
                return numba.njit(function, cache=True, nogil=True)
            except RuntimeError:  # nothing may be written there
                continue
        return numba.njit(function, nogil=True)
    finally:
        config.CACHE_DIR = given


def inner(function: _F) -> _F:
    """A function that compiled code alone calls."""
    return function if numba is None else numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def inlined(function: _F) -> _F:
    """The same, for what is short and called often: references to its arguments are not counted."""
    if numba is None:
        return function
    return numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
