"""What the pages show is so: their commands have settings that exist and are run, pictures and tables are those of the
code, and the site builds without a broken link, or anything that is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from docs.commands import Block, blocks, pages
from docs.pictures import IMAGES, commands, drawn
from docs.reference import FOLDER
from docs.reference import pages as reference
from jobs.config import ConfigError, TrainConfig
from launch.cli import COMMANDS, main, named
from launch.config import config_from_dict
from launch.words import given
from pipeline.settings import check_bounds, names_of
from pipeline.state.optimizer import OptimizerConfig
from recovery.policy import POLICIES
from schedulers.plan import ENGINES

ROOT = Path(__file__).parents[1]
OTHERS = [ROOT / name for name in ("README.md", "jobs/unlearn/README.md", "benchmarks/README.md")]
SHOWN = {str(page.relative_to(ROOT)): blocks(page.read_text()) for page in [*OTHERS, *pages()]}
CHOOSE = (ROOT / "docs" / "pages" / "choose.md").read_text()


# ---- commands ----


def test_words_of_a_command_are_read_as_a_shell_reads_them() -> None:
    text = "a=1 unbroken train --out 'x y' \\\n    --steps 2 >> log | head # note\n"
    block = Block(f"{text}torchrun unbroken eval --chunks 2; ls &\n")
    assert list(block.of_unbroken()) == [["train", "--out", "x y", "--steps", "2"], ["eval", "--chunks", "2"]]
    assert [words[0] for words in block.words()] == ["a=1", "head", "torchrun", "ls"]


def test_a_comment_above_a_block_says_how_it_is_tried() -> None:
    shown = "```bash\nunbroken train \\\n    --out a > b\n```\n"
    small, read = blocks(f"<!-- run with: --steps 4 -->\n{shown}<!-- parsed: why -->\n{shown}")
    assert small.small == "unbroken train \\\n    --out a  --steps 4 > b\n"
    assert read.flags is None


@pytest.mark.parametrize("page", [page for page, found in SHOWN.items() if any(list(b.of_unbroken()) for b in found)])
def test_commands_have_settings_that_exist_and_go_together(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    before = dict[Path, dict[str, Any]]()
    for words in (words for block in SHOWN[page] for words in block.of_unbroken()):
        try:
            _configured(words, before)
        except ConfigError as error:
            pytest.fail(f"unbroken {' '.join(words)}: {error}")


def _configured(words: list[str], before: dict[Path, dict[str, Any]]) -> None:
    """Build and validate the settings, as the command does before it starts. `before` has those of runs that commands
    further up have begun; what a command reads is there."""
    name, flags = words[0], words[1:]
    if name.startswith("--"):
        return
    settings, flags = COMMANDS[name].load()[0], named(COMMANDS[name], flags)
    asked = given(settings, [flag for flag in flags if flag != "--help"])
    kept = before.get(Path(asked.get("out", "runs/default")), {}) if name == "train" and asked.get("resume") else {}
    config = config_from_dict(settings, {**kept, **asked})
    _there(config)
    check_bounds(config)
    if name == "train":
        before[config.out] = {each: getattr(config, each) for each in names_of(TrainConfig) if each not in _OF_A_START}
    if isinstance(config, TrainConfig) and not (
        name != "train" and (config.resume or getattr(config, "abandon", False))
    ):
        config.validate()


_OF_A_START = ("inject", "resume", "change", "until", "min_workers", "workers")


def _there(config: Any) -> None:
    """Have what a command reads be there: files that settings name, and models."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "model" and isinstance(value, str) and ("/" in value or value == "DIR"):
            Path(value).mkdir(parents=True, exist_ok=True)
        if field.name in ("oracle", "floor") and value is not None:
            value.mkdir(parents=True, exist_ok=True)
        elif Path in get_args(hints[field.name]) and field.name != "out" and value is not None and not value.exists():
            value.parent.mkdir(parents=True, exist_ok=True)
            value.touch()


def test_scripts_that_are_shown_are_there() -> None:
    shown = {word for found in SHOWN.values() for block in found for words in block.words() for word in words}
    named = {word for word in shown if re.fullmatch(r"(benchmarks|docs)/[\w/.-]+", word)}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_that_take_a_moment_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {tuple(words) for found in SHOWN.values() for block in found for words in block.of_unbroken()}
    quick = {words for words in quick if words[0] in ("simulate", "draw", "authors")}
    assert quick
    assert {words: main(words) for words in sorted(quick)} == dict.fromkeys(sorted(quick), 0)


RUN = [page for page, found in SHOWN.items() if page.startswith("docs/") and any(b.flags is not None for b in found)]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUN)
def test_all_commands_of_a_page_run_in_their_order(page: str, tmp_path: Path) -> None:
    """Those that a comment does not keep from it, from the first to the last, in a folder that has the repository's
    measurements alone."""
    run = [block for block in SHOWN[page] if block.flags is not None]
    programs = {words[0] for block in run for words in block.words() if "=" not in words[0]}
    if missing := sorted(each for each in programs if each != "unbroken" and not _is_there(each)):
        pytest.skip(f"not installed here: {', '.join(missing)}")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, words in (("unbroken", "-m launch"), ("torchrun", "-m torch.distributed.run"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tools / name).chmod(stat.S_IRWXU)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(block.small for block in run)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1700,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


def _is_there(program: str) -> bool:
    known = subprocess.run(["bash", "-c", 'type "$1"', "bash", program], capture_output=True)
    return known.returncode == 0 or program in ("torchrun", "python")


# ---- what is made from the code ----


def test_the_reference_is_that_of_the_settings() -> None:
    written = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    assert written == reference(), "run `python -m docs.reference`"
    shown = {
        name: {flag.replace("-", "_") for flag in re.findall(r"^\| `--([\w-]+)`", written[f"{name}.md"], re.MULTILINE)}
        for name in COMMANDS
    }
    for name, command in COMMANDS.items():
        found = {field.name for field in fields(command.load()[0])}
        assert found == shown[name] | (shown["train"] if "[train]" in written[f"{name}.md"] else set()), name


def test_pictures_are_what_the_commands_on_the_pages_draw() -> None:
    made = drawn(("draw",))
    assert made
    assert {name: (IMAGES / name).read_bytes() for name in made} == made, "run `python -m docs.pictures`"


@pytest.mark.long
def test_pictures_of_plans_are_what_the_commands_on_the_pages_draw() -> None:
    made = drawn()
    assert {path.name: path.read_bytes() for path in IMAGES.glob("*.svg")} == made, "run `python -m docs.pictures`"


def test_every_picture_is_shown_and_has_its_command() -> None:
    shown = {name for page in pages() for name in re.findall(r"images/([\w.-]+\.svg)\)", page.read_text())}
    assert shown == {path.name for path in IMAGES.glob("*.svg")}
    made = {out.removesuffix(".svg") for out in commands()}
    assert all(any(name.startswith(out) for out in made) for name in shown)


def test_remedies_stand_in_the_order_in_which_they_are_tried() -> None:
    rows = re.findall(r"^\| `([a-z][a-z+-]+)` \| ([a-z+, -]*?) ?\|$", CHOOSE, flags=re.MULTILINE)
    assert {name: tuple(filter(None, tried.split(", "))) for name, tried in rows} == dict(POLICIES)


def test_what_the_table_says_goes_together_does() -> None:
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| (yes|no)\b.*? \| (yes|no)\b.*? \| (yes|no)\b.*? \|$", CHOOSE, re.MULTILINE
    )
    said = {name: answers for names, *answers in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(ENGINES)
    network = Path(__file__)  # its contents are not read before a run
    asked: list[dict[str, Any]] = [{"snapshot": "neighbour"}, {"min_workers": 2}, {"recovery": "redundant"}]
    for name, answers in said.items():
        known = {"scheduler": name, "network": network if name == "skippipe" else None}
        assert answers == ["yes" if _goes(known | each) else "no" for each in asked], name


def _goes(values: dict[str, Any]) -> bool:
    try:
        TrainConfig(**values).validate()
    except ConfigError:
        return False
    return True


def test_the_batch_formula_is_that_of_a_run() -> None:
    config = TrainConfig(microbatches=6, microbatch_size=5, replicas=2, workers=4)
    assert config.samples_per_step == 6 * 5
    assert isinstance(config.optimizer_config(), OptimizerConfig)


# ---- the site ----


def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is in the extra docs")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", "docs/mkdocs.yml", "-d", str(site)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(found) > len(pages())
    loaded = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=.?https?:[^>]*>")
    assert {each for text in found.values() for each in loaded.findall(text)} == set()
