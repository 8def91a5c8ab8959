"""What the README says of settings and remedies is what the code does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from launch.cli import COMMANDS
from recovery.policy import POLICIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS_SHOWN = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("unbroken ", "torchrun "))
]


def test_it_is_short() -> None:
    assert README.count("\n") <= 150
    assert not [line for line in README.splitlines() if len(line) > 130 and not line.startswith("|")]


def test_remedies_stand_in_the_order_in_which_they_are_tried() -> None:
    rows = re.findall(r"^\| ((?:`[a-z+]+`(?:, )?)+) \|\s*([a-z+, ]*?)\s*\|", README, flags=re.MULTILINE)
    said = {
        name: tuple(filter(None, tried.split(", "))) for names, tried in rows for name in re.findall(r"`(.+?)`", names)
    }
    assert {name: tried for name, tried in said.items() if name in POLICIES} == dict(POLICIES)


@pytest.mark.parametrize("command", COMMANDS_SHOWN)
def test_its_commands_have_settings_that_exist(command: str) -> None:
    words = shlex.split(command)
    words = words[words.index("unbroken") + 1 :]
    settings, _ = COMMANDS[words[0]].load()
    names = {f.name.replace("_", "-") for f in fields(settings)}
    assert {word[2:] for word in words if word.startswith("--")} <= names


def test_what_it_links_to_is_there() -> None:
    for text, folder in ((README, ROOT), ((ROOT / "benchmarks" / "README.md").read_text(), ROOT / "benchmarks")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / target).exists(), target


def test_every_script_that_the_measurements_name_is_there() -> None:
    named = set(re.findall(r"python benchmarks/(\w+\.py)", (ROOT / "benchmarks" / "README.md").read_text()))
    assert named
    assert all((ROOT / "benchmarks" / name).is_file() for name in named)
