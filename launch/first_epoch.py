"""The method first_epoch: the first epoch of a run is run again, and what rows to forget taught in it is taken back."""

from __future__ import annotations

import shutil

from jobs.config import TrainConfig
from jobs.erase import erased_copy
from jobs.forgettable import open_forgettable
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.finish import GRADIENTS, REPLAY
from jobs.unlearn.first_gradients import FirstGradientsConfig, take_back_gradients
from jobs.unlearn.methods.first_epoch import FirstEpoch
from jobs.unlearn.request import Request
from jobs.unlearn.settings import method_of
from launch.agent import RunFailed
from launch.past import read_ledger
from launch.replay import ReplayConfig, replay
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config


def take_first_epoch_back(config: UnlearnConfig, request: Request, as_json: bool) -> None:
    """Have the model of the request in its folder; interrupted, it is done again from the start of the run. Raises as
    `replay` does, and RunFailed where the epoch does not come out as it was."""
    method, erased, gradients = method_of(config), config.out / "data-after", config.out / GRADIENTS
    assert isinstance(method, FirstEpoch)
    if (config.out / "model").is_dir():
        return
    shutil.rmtree(gradients, ignore_errors=True)
    erased_copy(config.run / "data", erased, {row["digest"] for row in request.rows})
    samples = open_forgettable(config.run / "data").num_train
    lines = [line for line in read_ledger(config.run) if line["step"] <= request.step]
    last = max(line["step"] for line in lines if line["first_sample"] < samples)
    embedding = LayeredModel(read_config(config.run / "model-config")).keys(0)
    wanted = ",".join(embedding) if method.layers == "embedding" else "*"

    def looking(run: TrainConfig) -> TrainConfig:
        return FirstGradientsConfig.of(run, erased, gradients, wanted)

    again = ReplayConfig(config.run, last, 1, config.workers, out=config.out / REPLAY, json=as_json)
    report, _ = replay(again, looking)
    if not report["equal"]:
        raise RunFailed(f"the first epoch did not come out as it was: {report['first_difference']}", 1)
    take_back_gradients(config.out / "start", gradients, method.eta, config.run / "tokenizer", config.out / "model")
