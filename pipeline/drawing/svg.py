"""The little of SVG that the pictures share: colours even to the eye, round axis ticks, units, and well-formed tags.

Pictures are written by hand so that a training run needs no plotting library and a picture stays a small text
file. They bring their own light background, which keeps them readable in light and in dark viewers. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from xml.sax.saxutils import escape, quoteattr

PAPER, INK, MUTED, FAINT, RULE = "#fdfdfb", "#1f2328", "#656d76", "#e6e7e4", "#c4c8cc"
FONT = "ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
_CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """`text` without the characters XML 1.0 has no way to write."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def coord(value: float) -> str:
    """A coordinate in pixels to a hundredth, in as few characters as it takes."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def tag(name: str, /, content: str | None = None, **attributes: str | float | None) -> str:
    """One element. `content` is markup already; attribute values are escaped, `font_size` is written `font-size`."""
    written = "".join(
        f" {key.strip('_').replace('_', '-')}={quoteattr(clean(value) if isinstance(value, str) else coord(value))}"
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}/>" if content is None else f"<{name}{written}>{content}</{name}>"


def text(x: float, y: float, words: str, **attributes: str | float | None) -> str:
    """A line of text whose baseline is at `y`; escapes `words`."""
    return tag("text", escape(clean(words)), x=x, y=y, **attributes)


def tooltip(words: str) -> str:
    """The title of the element it is put into: shown by a pointer, read by a screen reader; escapes `words`."""
    return tag("title", escape(clean(words)))


def document(width: float, height: float, body: Iterable[str], *, title: str, description: str = "") -> str:
    """A whole SVG file on a light sheet of paper; `title` and `description` are what a screen reader says."""
    sheet = tag("rect", width="100%", height="100%", rx=6, fill=PAPER)
    head = tooltip(title) + (tag("desc", escape(clean(description))) if description else "")
    return tag(
        "svg",
        "\n".join((head, sheet, *body)) + "\n",
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {coord(width)} {coord(height)}",
        role="img",
        aria_label=title,
        font_family=FONT,
        font_size=12,
        fill=INK,
    )


def text_width(words: str, size: float = 12.0) -> float:
    """About how many pixels `words` take; a little generous, since the viewer's font is unknown."""
    return 0.57 * size * len(words)


@lru_cache(maxsize=4096)
def oklch(lightness: float, chroma: float, hue: float) -> str:
    """`#rrggbb` of an OKLCH colour, hue in degrees: equal steps look equal, whatever the hue.

    Where the screen cannot show that much chroma, chroma gives way and lightness stays. Source: Björn Ottosson, "A
    perceptual color space for image processing", 2020.
    """
    while True:
        a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
        l3 = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        m3 = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        s3 = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
            -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
            -0.0041960863 * l3 - 0.7034186147 * m3 + 1.7076147010 * s3,
        )
        if chroma < 1e-3 or all(-1e-4 <= c <= 1.0001 for c in linear):
            return "#" + "".join(f"{round(255 * _gamma(min(max(c, 0.0), 1.0))):02x}" for c in linear)
        chroma *= 0.93


def _gamma(c: float) -> float:
    return 12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055


def mix(a: str, b: str, share: float) -> str:
    """`#rrggbb` between `a` (share 0) and `b` (share 1)."""
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in pairs)


def ticks(lo: float, hi: float, count: int = 8) -> list[float]:
    """At most about `count` round values (1, 2 or 5 times a power of ten apart) inside `[lo, hi]`."""
    if not (math.isfinite(lo) and math.isfinite(hi)) or hi < lo:
        raise ValueError(f"ticks between {lo} and {hi}: expected finite lo <= hi")
    if hi == lo:
        return [lo]
    rough = (hi - lo) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def time_unit(seconds: float) -> tuple[float, str]:
    """(factor, unit): `seconds * factor` is a number of a readable size in that unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(seconds) * factor >= 1.0:
            return factor, unit
    return (1.0, "s") if seconds == 0 else (1e6, "µs")


def duration(seconds: float) -> str:
    """`1.24 s`, `36.2 ms`, `870 µs`: three figures that count."""
    factor, unit = time_unit(seconds)
    return f"{figure(seconds * factor)} {unit}"


def figure(value: float) -> str:
    """A number to three figures that count, without an exponent between 1e-4 and 1e15, thousands separated."""
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3g}"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{digits}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def data_size(num_bytes: float) -> str:
    """`1.5 GiB`, `12 MiB`: bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{figure(num_bytes)} {unit}"
        num_bytes /= 1024
    return f"{figure(num_bytes)} TiB"
