"""One forkserver for the whole session, forked before any test has started a thread, and a check for leftovers.

The process that hands out the tests to others (`-n 2`) runs none: it imports nothing, since they wait for it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ["UNBROKEN_CACHE"] = tempfile.mkdtemp(prefix="unbroken-cache-")  # of the session: nothing is left at home

import psutil
import pytest

if TYPE_CHECKING:
    from launch.forkserver import ForkServer

_FORKSERVER = pytest.StashKey["ForkServer"]()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # nothing that is made before all tests are there is garbage
    import torch
    from hypothesis import settings

    import launch.page.draw
    import launch.unlearn  # what every command imports
    from jobs.config import TrainConfig
    from launch.forkserver import ForkServer
    from launch.warm import warm_up
    from tests.harness import entry

    torch.set_num_threads(1)
    settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("tests")
    for model in ("llama-tiny", "gpt2-tiny", "qwen3-tiny"):
        warm_up(TrainConfig(model=model, lora_rank=int(model == "llama-tiny")))  # so that peft is there as well
    launch.page.draw._template()  # else each run compiles it anew
    with contextlib.suppress(ImportError):  # what transformers compiles for the first model that it loads
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    gc.enable()  # in what is forked
    config.stash[_FORKSERVER] = ForkServer(entry)
    gc.disable()


LONGEST = (
    "test_recovery", "test_elastic", "test_train", "test_unlearn", "test_shard_runs", "test_soak", "test_pool",
    "test_reroute", "test_parity", "test_unlearn_parity", "test_skip_engine", "test_footprint", "test_lora",
)  # fmt: skip
"""They begin first, so that no worker has one of them left when all others are done."""


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # a stable sort


@pytest.fixture(scope="session")
def forkserver(request: pytest.FixtureRequest) -> ForkServer:
    """Forks workers that run a function of tests.harness."""
    return request.config.stash[_FORKSERVER]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FORKSERVER in config.stash:
        config.stash[_FORKSERVER].close()
    shutil.rmtree(os.environ["UNBROKEN_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every process that a test starts has ended, and its shared memory is gone, when the test is over."""
    before, shared = _descendants(), _shared_memory()
    yield
    if _descendants() - before:
        left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        _, alive = psutil.wait_procs(left, timeout=3)
        assert not alive, f"processes left behind: {alive}"
    if left := _shared_memory() - shared - _of_others(tmp_path_factory.getbasetemp()):
        time.sleep(0.5)  # another run beside this one may just have made it, and not locked it yet
        assert not left & _shared_memory(), f"shared memory left behind: {left}"


def _descendants() -> set[int]:
    """The processes that come from this one. To find them, psutil looks at every process of the machine."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return {process.pid for process in psutil.Process().children(recursive=True)}
    found, waiting = set[int](), [os.getpid()]
    while waiting:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                with contextlib.suppress(OSError):
                    children = [int(pid) for pid in (task / "children").read_text().split()]
                    found.update(children)
                    waiting += children
    return found


def _of_others(base: Path) -> set[str]:
    """Stores of runs whose folder is none of this process's tests: theirs to remove, when they find them again."""
    from pipeline.state.host_store import store_path

    stores = {path.name for path in Path("/dev/shm").glob(f"unbroken-{os.getuid()}-*")}
    return stores - {store_path(Path(folder)).name for folder, _, _ in os.walk(base)} if stores else set()


def _shared_memory() -> set[str]:
    """The names there, without those that a process which is none of ours holds a lock on."""
    if not Path("/dev/shm").is_dir():
        return set()
    found: dict[str, int] = {}
    for path in Path("/dev/shm").iterdir():  # the driver of a device has files of its own there
        if path.name.startswith("cuda."):
            continue
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ino
    if not found:
        return set()
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]  # later: a file is locked once made
    holders = {int(words[5].split(":")[2]): int(words[4]) for words in locks if words[1] == "FLOCK"}
    ours = {os.getpid(), *_descendants()}
    return {name for name, inode in found.items() if holders.get(inode, os.getpid()) in ours}
