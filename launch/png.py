"""PNGs of a run's pictures, for where an SVG cannot be shown: drawn by resvg, which the extra `png` brings."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.settings import ConfigError, require
from recovery.disk import write_flushed

_ZOOM = 2
"""Pixels for each of the picture's, for screens that have many."""
_PROBE = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><text x="2" y="16">{}</text></svg>'


def require_png() -> None:
    """Raise ConfigError where no PNG can be drawn, or none with text in it."""
    require(find_spec("resvg_py") is not None, "png", True, "unset without its package; pip install 'unbroken[png]'")
    resvg: Any = import_module("resvg_py")
    empty, text = (resvg.svg_to_bytes(svg_string=_PROBE.format(each)) for each in ("", "W"))
    require(bytes(empty) != bytes(text), "png", True, "unset on a machine without fonts, such as fonts-dejavu")


def write_pngs(folder: Path) -> list[Path]:
    """Write NAME.png beside every NAME.svg of a folder; returns them. Raises ConfigError for a picture that cannot be
    read or drawn, and a file that cannot be written."""
    resvg: Any = import_module("resvg_py")
    found = list[Path]()
    for path in sorted(folder.glob("*.svg")):
        png = path.with_suffix(".png")
        try:
            drawn = resvg.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), background="white", zoom=_ZOOM)
            write_flushed(png, bytes(drawn))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(path)!r} has no PNG: {error}") from error
        found.append(png)
    return found
