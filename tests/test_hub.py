"""Models by their id: what is in the local cache is used, all else is refused by the command that fetches it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from jobs.config import TrainConfig
from launch.inference import Source
from pipeline.model.hub import cached, how_to_have
from pipeline.model.weights import ModelError, Weights, has_weights, resolve
from pipeline.settings import ConfigError
from tests.test_weights import save

ID = "someone/tiny-llama"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as `hf download` lays it out, with one model in it; the folder of that."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", unasked)
    kept = tmp_path / "hub" / "models--someone--tiny-llama"
    snapshot = kept / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(snapshot.name)
    save(snapshot)
    return snapshot


def unasked(*_: object) -> None:
    raise AssertionError("a network is asked")


def test_an_id_in_the_cache_is_a_model_with_weights(cache: Path) -> None:
    assert cached(ID) == resolve(ID, cache) == cache
    assert has_weights(ID)
    assert TrainConfig(model=ID, data="stdlib").resolved().lr == 2e-5, "weights that were trained before"
    with pytest.raises(ConfigError, match=rf"data is unset; allowed with the weights of model '{ID}'"):
        TrainConfig(model=ID).resolved().validate()


def test_an_id_that_is_not_there_is_refused_with_the_command_that_fetches_it(cache: Path) -> None:
    assert not has_weights("someone/other")
    with pytest.raises(ModelError, match=r"nothing at that path; .*`hf download someone/other` puts them there$"):
        resolve("someone/other", cache)
    with pytest.raises(ConfigError, match=r"no config.json; .*`hf download someone/other` puts them there$"):
        Source.open(Path("someone/other"))


def test_one_that_is_not_whole_is_refused_too(cache: Path) -> None:
    next(cache.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=rf"'{ID}' is not whole: .*not there: .*`hf download {ID}` puts them there$"):
        resolve(ID, cache)


@pytest.mark.parametrize(
    "name", ["../up", "a/b/c", "", ".", "/etc", "-r/x", "a" * 90 + "/bbbbbbbb", "llama-9m", "a b/c"]
)
def test_what_is_no_id_is_not_looked_up(cache: Path, name: str) -> None:
    assert cached(name) is None
    assert how_to_have(name) == ""


def test_a_path_that_exists_is_no_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cached(ID) is None
    assert Weights(cache).files
