"""What is measured of models on disk: probabilities and KL divergence, against transformers in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.config import ConfigError
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.oracle import check_oracles
from jobs.unlearn.probe import compare, probe
from pipeline.model.weights import preset
from pipeline.runtime.batch import IGNORED
from tests.test_cli import exported
from tests.unlearn_rows import VOCABULARY, RandomRows


def drawn(folder: Path, seed: int) -> Path:
    """A model of random weights on disk, far enough from another one for a distance to be seen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(preset("llama-tiny", vocab_size=VOCABULARY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: drawn(folder / name, seed) for seed, name in enumerate(("oracle", "floor", "after"))}


def test_the_distance_of_models_is_that_of_one_process(models: dict[str, Path]) -> None:
    rows = RandomRows(0)
    material = Material(rows, range(5), range(5, 12), 0)
    items = [Item(FORGET, i) for i in range(5)] + [Item(RETAIN, i) for i in range(5, 12)]
    found = compare(models, material, items, 3, "oracle")
    loaded = {which: AutoModelForCausalLM.from_pretrained(folder).eval() for which, folder in models.items()}
    for kind, indices in ((FORGET, range(5)), (RETAIN, range(5, 12))):
        sums, sure, count = dict.fromkeys(models, 0.0), {which: list[float]() for which in models}, 0
        for index in indices:
            sample = rows.row(index)
            mine, ids = sample.labels != IGNORED, torch.from_numpy(sample.input_ids)[None]
            labels = torch.from_numpy(sample.labels)[mine]
            with torch.no_grad():
                logp = {w: torch.log_softmax(m(input_ids=ids).logits[0][mine], -1) for w, m in loaded.items()}
            for which, own in logp.items():
                kl = functional.kl_div(own, logp["oracle"], log_target=True, reduction="sum")
                sums[which] += float(kl)
                sure[which].append(float(torch.exp(own.gather(1, labels[:, None]).mean())))
            count += int(mine.sum())
        for which in models:
            probability = sum(sure[which]) / len(sure[which])
            assert found[which][f"{kind}_probability"] == pytest.approx(probability, rel=1e-4)
            if which == "oracle":
                assert f"{kind}_kl" not in found[which]
            else:
                assert found[which][f"{kind}_kl"] == pytest.approx(sums[which] / count, rel=1e-4)
                assert found[which][f"{kind}_kl"] > 0.01
    alone = probe(models["after"], material, items, 5)
    assert {name: found["after"][name] for name in alone} == pytest.approx(dict(alone), rel=1e-5)
    same = dict.fromkeys(("oracle", "before"), models["oracle"])
    assert compare(same, material, items, 4, "oracle")["before"]["forget_kl"] == pytest.approx(0, abs=1e-9)


def test_a_kind_without_rows_has_no_distance(models: dict[str, Path]) -> None:
    found = compare(models, Material(RandomRows(0), [], range(3), 0), [Item(RETAIN, 0)], 2, "oracle")
    assert set(found["after"]) == {"retain", "retain_probability", "retain_kl"}


def test_an_oracle_of_other_tokens_is_refused(tmp_path: Path) -> None:
    ours, run = exported(tmp_path / "ours", "llama-tiny"), tmp_path / "run"
    AutoTokenizer.from_pretrained(ours).save_pretrained(run / "tokenizer")
    (run / "model-config").mkdir()
    shutil.copy(ours / "config.json", run / "model-config" / "config.json")
    check_oracles(UnlearnConfig(run=run, oracle=ours, floor=ours))

    larger = Path(shutil.copytree(ours, tmp_path / "larger"))
    values = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**values, "vocab_size": 300}))
    with pytest.raises(
        ConfigError, match=r"floor is '.*larger'; allowed: a model with the run's 258 tokens; it has 30"
    ):
        check_oracles(UnlearnConfig(run=run, oracle=ours, floor=larger))

    other = Path(shutil.copytree(ours, tmp_path / "other"))
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(
        ConfigError, match=r"oracle is '.*other'; allowed: a model with the run's tokenizer, .*4 entries"
    ):
        check_oracles(UnlearnConfig(run=run, oracle=other))

    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"oracle is '.*other', which cannot be compared with the run: .*holds none of"
    ):
        check_oracles(UnlearnConfig(run=run, oracle=other))
