"""A sheet as one self-contained page of HTML: its style and its script are in it, and nothing else is ever loaded.

The page says by a content security policy that only its own script may run and that it reaches nothing: should a text
of a run ever get past the escaping, a browser still would not obey it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

from launch.page.blocks import Sheet
from launch.page.made_of import when
from pipeline.drawing.svg import clean

_HERE = Path(__file__).parent


@cache
def _template() -> Template:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=False, auto_reload=False,
        finalize=lambda value: clean(value) if type(value) is str else value,
    ).get_template("page.html")  # fmt: skip


@cache
def _files() -> tuple[str, str, str]:
    """Style, script, and the hash of the script that the policy names."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = hashlib.sha256(script.encode()).digest()
    return style, script, base64.b64encode(digest).decode()


@cache
def _release() -> str:
    try:
        return metadata.version("unbroken")
    except metadata.PackageNotFoundError:
        return ""


def page(sheet: Sheet, *, served: bool = False, version: str = "") -> str:
    """The HTML. A `served` one asks its server whether there is another `version`."""
    style, script, digest = _files()
    drawn = when(sheet.drawn)
    return _template().render(
        sheet=sheet, style=style, script=script, script_hash=digest, served=served, drawn=drawn, release=_release(),
        drawn_iso=drawn.removesuffix(" UTC").replace(" ", "T") + "Z", version=version,
    )  # fmt: skip
