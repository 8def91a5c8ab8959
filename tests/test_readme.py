"""The README is short, and what it names is there; its commands are tried in test_docs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert README.count("\n") <= 150
    assert not [line for line in README.splitlines() if len(line) > 130 and not line.startswith("|")]


def test_what_it_links_to_is_there() -> None:
    for text, folder in ((README, ROOT), ((ROOT / "benchmarks" / "README.md").read_text(), ROOT / "benchmarks")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / target).exists(), target


def test_every_script_that_the_measurements_name_is_there() -> None:
    named = set(re.findall(r"python benchmarks/(\w+\.py)", (ROOT / "benchmarks" / "README.md").read_text()))
    assert named
    assert all((ROOT / "benchmarks" / name).is_file() for name in named)
