"""Whether the packages that would be imported are ours.

Ours have names that others use too. A folder `jobs` of the user's where the command is run, or on PYTHONPATH, would be
imported instead, half of it ours and half not, so the command looks where each package lies before it imports any.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("pipeline", "schedulers", "recovery", "jobs", "launch")
_HERE = Path(__file__).resolve().parent.parent


def foreign() -> str | None:
    """What to say of the first package that would be taken from elsewhere; None if all lie beside this one."""
    for name in PACKAGES:
        spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
        place = None if spec is None else _place(spec)
        if place != _HERE / name:
            found = "is not there" if place is None else f"would be taken from {str(place)!r}"
            return (
                f"package {name!r} {found}, and not from {str(_HERE / name)!r}, where this command lies; allowed: "
                "another working folder or PYTHONPATH, or another name for what is found there"
            )
    return None


def _place(spec: ModuleSpec) -> Path | None:
    """Where a package or a module lies; a folder without __init__.py is one too."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return None if spec.origin is None else Path(spec.origin).resolve()
