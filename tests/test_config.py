"""Settings: what is refused and how, where a value comes from, and what a plan makes of it all."""

from __future__ import annotations

import json
import math
import tomllib
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from jobs.config import ConfigError, TrainConfig
from jobs.corpus import CorpusError
from jobs.pipelines import plan_layout
from jobs.plan import layer_costs, make_plan, model_fingerprint, open_dataset, set_dropout
from launch.cli import main
from launch.config import config_from_dict, config_from_toml, to_toml
from pipeline.model.layered import LayeredModel, ModelError
from pipeline.model.weights import preset
from pipeline.schedule.ops import B, F, W
from pipeline.schedule.verify import verify
from pipeline.settings import declared, tables
from recovery import checkpoint
from recovery.checkpoint import CheckpointError
from recovery.inject import InjectionError
from schedulers import PLANNERS

ROUNDS = {"scheduler": "roundpipe"}


# ---- what cannot work, whatever the model and the data are ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: 0}, rf"^{name} is 0; allowed: 1 to \d+$")
            for name in ("workers", "replicas", "chunks", "microbatches", "microbatch_size", "sequence_length", "steps",
                         "evaluate_samples", "keep")
        ],
        *[
            ({name: -1}, rf"^{name} is -1; allowed: 0 to \d+$")
            for name in ("checkpoint_every", "evaluate_every", "warmup", "max_tokens", "threads", "sample_tokens",
                         "clip", "weight_decay")
        ],
        ({"until": 7, "steps": 6}, r"^until is 7; allowed: 0 to 6, the steps of the run$"),
        ({"scheduler": "pipedream"}, r"^scheduler is 'pipedream'; allowed: one of gpipe, one_f_one_b, interleaved, z"),
        ({"scheduler": ""}, r"^scheduler is ''; allowed: one of"),
        ({"workers": 4, "replicas": 3}, r"^replicas is 3; allowed: a divisor of workers \(4\)$"),
        ({"replicas": 2, "microbatches": 5}, r"^microbatches is 5; allowed: a multiple of replicas \(2\)$"),
        ({"lr": 0.0}, r"^lr is 0.0; allowed: above 0, up to 100$"),
        ({"lr": math.inf}, r"^lr is inf; allowed"),
        ({"lr": math.nan}, r"^lr is nan; allowed"),
        ({"clip": math.nan}, r"^clip is nan; allowed"),
        ({"clip": math.inf}, r"^clip is inf; allowed"),
        ({"scheduler": "1f1b"}, r"roundpipe \(did you mean one_f_one_b\?\)$"),
        ({"recovery": "checkfre"}, r"^recovery is 'checkfre'; allowed: .* \(did you mean checkfree\?\)$"),
        ({"at_once": 2}, r"^at_once is 2; allowed: 0 unless scheduler is roundpipe$"),
        ({"swaps": True}, r"^swaps is True; allowed: False unless scheduler is skippipe$"),
        ({"eps": -1e-8}, r"^eps is -1e-08; allowed"),
        ({"eps": math.nan}, r"^eps is nan; allowed"),
        ({"beta1": 1.0}, r"^beta1.*\b1\.0.*; allowed: .*below 1$"),
        ({"beta2": 2.0}, r"beta2.*\b2\.0.*; allowed: .*below 1$"),
        ({"beta1": -0.5}, r"^beta1.*-0\.5.*; allowed: .*below 1$"),
        ({"beta2": -0.5}, r"beta2.*-0\.5.*; allowed: .*below 1$"),
        ({"beta2": math.nan}, r"beta2.*nan.*; allowed"),
        ({"deadline": 0.0}, r"^deadline is 0.0; allowed: above 0"),
        ({"deadline": math.inf}, r"^deadline is inf; allowed"),
        ({"deadline": 1e15}, r"^deadline is 1000000000000000.0; allowed"),
        ({"held_out": -0.1}, r"^held_out is -0.1; allowed: 0 or more and below 1$"),
        ({"held_out": 1.0}, r"^held_out is 1.0; allowed: 0 or more and below 1$"),
        ({"min_lr_ratio": 1.5}, r"^min_lr_ratio is 1.5; allowed: 0 to 1$"),
        ({"dropout": 1.0}, r"^dropout is 1.0; allowed: 0 or more and below 1$"),
        ({"store_port": 65536}, r"^store_port is 65536; allowed: 0 to 65535$"),
        ({"store_port": -1}, r"^store_port is -1; allowed: 0 to 65535$"),
        ({"ends": "home", "scheduler": "gpipe"}, r"^ends is 'home'; allowed: auto or in-line; home and apart only w"),
        ({"ends": "home", "workers": 2, "replicas": 2}, r"^ends is 'home'; .* 2 or more st"),
        ({"network": Path("nowhere.json")}, r"^network is 'nowhere.json'; allowed: a readable JSON file$"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "inject", "message"),
    [
        *[
            ({}, f"kill:worker=0,step=1,at={at}", rf"at is '{at}'; allowed without scheduler roundpipe: forward, back")
            for at in ("order", "upload", "uploaded", "committed")
        ],
        *[
            (ROUNDS, f"kill:worker=0,step=1,at={at}", rf"at is '{at}'; allowed with scheduler roundpipe: order, upload")
            for at in ("reduce", "optimizer", "recovery", "join")
        ],
        ({}, "kill:worker=104,step=1", r"worker is 104; allowed: 0 to 103, the workers and those that may take their"),
        ({}, "kill:worker=0,step=1,at=exchange", r"at is 'exchange'; allowed without shard_optimizer: forward, backwa"),
        ({"max_failures": 0}, "kill:worker=4,step=1", r"worker is 4; allowed: 0 to 3, the workers"),
        ({"replicas": 2}, "kill:stage=2,step=1", r"stage is 2; allowed: 0 to 1$"),
        ({}, "rate:p=0.1,stages=1-4", r"stage is 4; allowed: 0 to 3$"),
        ({**ROUNDS, "max_failures": 1}, "kill:stage=5,step=1", r"stage is 5; allowed: 0 to 4$"),
        ({}, "kill:worker=1,step=100000000", r"step is '100000000'; allowed: a whole number of 0 to 99999999"),
        ({}, "slow:worker=1,step=1,factor=nan", r"factor is 'nan'; allowed: a number of 1 to 10000"),
    ],
)  # fmt: skip
def test_a_fault_that_could_never_happen_is_refused(changes: dict[str, Any], inject: str, message: str) -> None:
    with pytest.raises(InjectionError, match=message):
        TrainConfig(**changes, inject=inject).validate()


@pytest.mark.parametrize(
    ("changes", "inject"),
    [
        ({}, "kill:worker=103,step=1;kill:stage=3,step=1,at=join;rate:p=0.1,stages=0-3"),
        (ROUNDS, "kill:worker=103,step=1;kill:stage=3,step=1,at=committed;rate:p=0.1,stages=0-3"),
    ],
)
def test_faults_that_may_happen_are_allowed(changes: dict[str, Any], inject: str) -> None:
    TrainConfig(**changes, inject=inject).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"workers": 1}, {"workers": 6, "replicas": 3, "microbatches": 9}, {"clip": 0.0}, {"clip": 1e6},
        {"warmup": 0}, {"warmup": 10_000}, {"dropout": 0.0}, {"beta1": 0.0}, {"min_lr_ratio": 0.0}, {"seed": -7},
        {"store_port": 65535}, {"checkpoint_every": 0, "evaluate_every": 0, "sample_tokens": 0, "max_tokens": 0},
        {"ends": "home", "workers": 4, "replicas": 2}, *[{"scheduler": name} for name in PLANNERS],
    ],
)  # fmt: skip
def test_the_edges_of_what_can_work_are_allowed(changes: dict[str, Any]) -> None:
    TrainConfig(**changes).validate()


# ---- TOML ----


def test_a_file_of_settings_is_read_with_dashes_or_underscores(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('microbatch-size = 3\nsequence_length = 64\nlr = 1\nout = "some/where"\nresume = true\n')
    read = config_from_toml(file, TrainConfig)
    assert read == TrainConfig(microbatch_size=3, sequence_length=64, lr=1.0, out=Path("some/where"), resume=True)
    assert isinstance(read.lr, float)
    assert isinstance(read.out, Path)


def test_a_file_may_have_a_table_for_each_group(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'steps = 9\n[model]\nmodel = "gpt2-tiny"\nmicrobatch-size = 3\n[schedule]\nworkers = 2\n[data]\ndata = "x"'
    )
    read = config_from_toml(file, TrainConfig)
    assert read == TrainConfig(steps=9, model="gpt2-tiny", microbatch_size=3, workers=2, data="x")
    flat = tomllib.loads(to_toml(CHANGED))
    grouped = {
        name: {key: flat[key] for key in declared(group) if key in flat} for name, group in tables(TrainConfig).items()
    }
    file.write_text(tomli_w.dumps(grouped))
    assert config_from_toml(file, TrainConfig) == CHANGED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker = 2", r"^worker \(did you mean workers\?\): no such setting; allowed: .*at_once, .*beta1, .*workers"),
        ("b = 2\na = 1", r"^a, b: no such setting"),
        ("learning-rate = 1", r"^learning_rate \(did you mean lr\?\): no such setting"),
        ("[train]\nworkers = 2", r"^train: no such setting; settings stand at the top of the file, and not in a tab"),
        ("[train]\nworkers = 2", r"such as \[train\], but for those of their groups: \[schedule\], \[model\], .*"),
        ("[model]\nworkers = 2", r"^model.workers is 2; allowed: in \[schedule\], or at the top of the file$"),
        ("[model]\nsede = 2", r"^model.sede is 2; allowed: model, .*compile \(did you mean seed\?\)$"),
        ("seed = 1\n[model]\nseed = 2", r"^seed is 2; allowed: once, at the top of the file or in a table$"),
        ("[model]\nseed = true", r"^seed is True; allowed: int$"),
        ("workers = 2.0", r"^workers is 2.0; allowed: int$"),
        ('workers = "2"', r"^workers is '2'; allowed: int$"),
        ("workers = true", r"^workers is True; allowed: int$"),
        ("workers = [2]", r"^workers is \[2\]; allowed: int$"),
        ("lr = true", r"^lr is True; allowed: float$"),
        ('lr = "fast"', r"^lr is 'fast'; allowed: float$"),
        ("recompute = 1", r"^recompute is 1; allowed: bool$"),
        ("model = 7", r"^model is 7; allowed: str$"),
        ("out = 7", r"^out is 7; allowed: Path$"),
        ("dropout = false", r"^dropout is False; allowed: float$"),
        ('dtype = "float16"', r"^dtype is 'float16'; allowed: 'float32' or 'bfloat16' \(did you mean bfloat16\?\)$"),
        ("dtype = 32", r"^dtype is 32; allowed: 'float32' or 'bfloat16'$"),
        ('network = {latency_s = 1}', r"^network is \{'latency_s': 1\}; allowed: Path$"),
        ("workers = ", r"^config is '.*run.toml', which is no TOML: "),
        ("workers = 2\nworkers = 3", r"^config is '.*run.toml', which is no TOML: "),
        ("x = " + "[" * 100_000, r"^config is '.*run.toml', which is no TOML that can be read: .* nested too deeply$"),
        ("workers = " + "9" * 5_000, r"^config is '.*run.toml', which is no TOML: "),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_from_toml(tmp_path / "run.toml", TrainConfig)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    for name, told in (("none.toml", "No such file"), (".", "Is a directory"), ("latin.toml", "utf-8")):
        with pytest.raises(ConfigError, match=rf"config is '{tmp_path / name}', which cannot be read: .*{told}"):
            config_from_toml(tmp_path / name, TrainConfig)


CHANGED = TrainConfig(
    workers=6, replicas=3, scheduler="zero_bubble", dtype="bfloat16", recompute=True, dropout=0.25, lr=3e-4,
    model="a \"quoted\" \\ name", data="é,漢\t", out=Path("runs/é x"), network=Path("net.json"), clip=0.5, seed=-1,
)  # fmt: skip


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED])
def test_settings_survive_toml_and_json(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert config_from_toml(tmp_path / "config.toml", TrainConfig) == config
    assert config_from_dict(TrainConfig, json.loads(json.dumps(asdict(config), default=str))) == config


@given(
    st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)  # fmt: skip
def test_any_number_and_any_text_survive_toml(lr: float, seed: int, data: str) -> None:
    import tomllib

    config = TrainConfig(lr=lr, seed=seed, data=data)
    assert config_from_dict(TrainConfig, tomllib.loads(to_toml(config))) == config


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "simulate.toml"
    file.write_text('scheduler = "gpipe"\nstages = 2\njson = true\n')

    def seen(*arguments: str) -> tuple[str, int, int]:
        assert main(["simulate", *arguments]) == 0
        out = json.loads(capsys.readouterr().out)
        return out["scheduler"], out["workers"], out["microbatches"]

    assert seen("--json") == ("one_f_one_b", 4, 8)
    assert seen("--config", str(file)) == ("gpipe", 2, 8)
    assert seen(f"--config={file}") == ("gpipe", 2, 8)
    assert seen("--stages", "3", "--config", str(file), "--microbatches", "5") == ("gpipe", 3, 5)
    assert seen("--config", str(file), "--scheduler", "one_f_one_b") == ("one_f_one_b", 2, 8)


# ---- the cut and the schedules ----


TINY = LayeredModel(preset("llama-tiny"))
"""Hidden 64, 4 blocks, 4 heads, inner 128, vocabulary 256, the head not tied."""


def test_the_cost_of_a_layer_is_its_products_and_a_fifth_more_for_what_a_block_does_beside() -> None:
    hidden, inner, sequence = 64, 128, 32
    weights = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    block = 2 * weights + 2 * sequence * hidden
    assert [2**20 * cost for cost in layer_costs(TINY, sequence)] == [
        0.01 * hidden,
        *[1.2 * block] * 4,
        2 * hidden * 256,
    ]


def settings(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": "llama-tiny", "tokenizer": "bytes", "workers": 2, "microbatches": 4, "microbatch_size": 2,
        "sequence_length": 32, "steps": 4, "evaluate_samples": 7,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


PLANS: list[dict[str, Any]] = [
    *[
        {"scheduler": name, "workers": workers, "replicas": replicas}
        for name in PLANNERS
        for workers, replicas in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))
    ],
    {"ends": "home"}, {"ends": "home", "workers": 3},
    {"ends": "home", "workers": 4, "replicas": 2}, {"scheduler": "interleaved", "chunks": 3},
]  # fmt: skip


@pytest.mark.parametrize("changes", PLANS, ids=lambda c: "-".join(f"{v}" for v in c.values()))
@pytest.mark.parametrize(("microbatches", "size", "evaluated"), [(4, 2, 7), (2, 1, 64), (12, 3, 1)])
def test_evaluation_runs_on_the_spans_that_training_holds(
    changes: dict[str, Any], microbatches: int, size: int, evaluated: int
) -> None:
    """Whatever the numbers of microbatches: a worker that is to run a span has it, and every layer is run once."""
    config = settings(**changes, microbatches=microbatches, microbatch_size=size)
    config.validate()
    made = plan_layout(config, TINY, evaluated)[0].schedules
    train, test = made["train"], made["evaluate"]
    assert (train.num_microbatches, test.num_microbatches) == (microbatches, -(-evaluated // size))
    for purpose, schedule in made.items():
        verify(schedule)
        for route in schedule.routes:
            assert [layer for span in route.forward for layer in range(*span)] == list(range(TINY.num_layers))
            assert route.backward == (route.forward[::-1] if purpose == "train" else ())
    assert not {op.kind for _, op in test.ops()} & {B, W}
    for span, workers in test.holders.items():
        assert set(workers) <= set(train.holders[span]), f"span {span} is evaluated where it is not held"
    assert set(train.lanes) == set(range(config.workers))
    mine = {w for w, lane in train.lanes.items() if any(op.kind == F for op in lane)}
    assert mine == set(train.lanes) or config.scheduler == "balanced"


def test_stages_are_as_equal_as_layers_allow() -> None:
    """4 equal blocks, an embedding that costs nothing and a head of about half a block."""
    for workers, slowest in ((2, 2.5), (3, 2.0), (4, 1.5), (6, 1.0)):
        train = plan_layout(settings(workers=workers), TINY, 2)[0].train
        costs = layer_costs(TINY, 32)
        largest = max(sum(costs[lo:hi]) for lo, hi in train.holders)
        assert largest <= slowest * costs[1] * 1.01


def test_the_head_sits_with_the_embedding() -> None:
    train = plan_layout(settings(workers=3, ends="home"), TINY, 2)[0].train
    held = {w: sorted(s for s, ws in train.holders.items() if w in ws) for w in range(3)}
    assert held[0][0][0] == 0
    assert held[0][-1] == (5, 6)
    assert all((5, 6) not in spans for w, spans in held.items() if w)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 7}, r"workers 7 / replicas 1 asks for 7 spans; .*at most 6"),
        ({"workers": 14, "replicas": 2}, r"workers 14 / replicas 2 asks for 7 spans; .*at most 6"),
        ({"workers": 4, "scheduler": "interleaved"}, r"workers 4 / replicas 1 x chunks 2 asks for 8 spans; .*most 6"),
        ({"workers": 7, "scheduler": "balanced"}, r"workers 7 / replicas 1 asks for 7 spans; .*at most 6"),
    ],
)
def test_more_stages_than_layers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layout(settings(**changes), TINY, 4)
    with pytest.raises(ConfigError, match=message):
        make_plan(settings(**changes, data=text(tmp_path), out=tmp_path / "run"), lambda what, share: None)


def test_as_many_stages_as_layers_are_one_layer_each() -> None:
    assert sorted(plan_layout(settings(workers=6), TINY, 4)[0].train.holders) == [(n, n + 1) for n in range(6)]


# ---- the whole plan ----


def text(folder: Path) -> str:
    """A corpus of about 20,000 bytes."""
    path = folder / "corpus.jsonl"
    if not path.exists():
        words = ["a", "pipeline", "of", "workers", "that", "may", "die", "at", "any", "moment", "trains", "this"]
        rows = (" ".join(words[(d * k) % 11] for k in range(1, 15)) for d in range(280))
        path.write_text("".join(json.dumps({"text": f"{n} {row}"}) + "\n" for n, row in enumerate(rows)))
    return str(path)


def planned(folder: Path, **changes: Any) -> Any:
    config = settings(**{"data": text(folder), "out": folder / "run", **changes})
    return make_plan(config, lambda what, share: None)


def test_a_plan_is_a_view_that_workers_can_read(tmp_path: Path) -> None:
    plan = planned(tmp_path, workers=3)
    view = plan.view
    assert (view.number, view.workers, view.first_step, view.first_sample) == (1, (0, 1, 2), 0, 0)
    assert (view.checkpoint, view.details["source"], plan.notes) == (None, None, ())
    assert config_from_dict(TrainConfig, json.loads(json.dumps(view.details["config"]))).workers == 3
    for purpose in ("train", "evaluate"):
        verify(plan.layout.schedules[purpose])
    assert view.layout == plan.layout.key
    assert plan.model.config.vocab_size == 258  # 256 bytes, the end, the padding
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["data", "model-config", "tokenizer"]
    assert open_dataset(tmp_path / "run").sequence_length == 32


@pytest.fixture
def config_files(tmp_path: Path) -> Path:
    """Model configs, good and bad, by file name."""
    good = preset("llama-tiny", vocab_size=300).to_dict()
    for name, changes in (
        ("good", {}), ("narrow", {"vocab_size": 100}), ("short", {"max_position_embeddings": 16}),
        ("bert", {"model_type": "bert"}), ("alien", {"model_type": "alien"}),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({**good, **changes}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(good))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "narrow.json"}, ConfigError, r"tokenizer 'bytes' has 258 tokens; .*narrow.json' allows at most 100"),
        ({"model": "short.json"}, ConfigError, r"sequence_length is 32; allowed: at most 16 for model .*short.json"),
        ({"model": "gpt2-tiny", "sequence_length": 513}, ConfigError, r"sequence_length is 513; allowed: at most 512"),
        ({"model": "bert.json"}, ModelError, r"'bert' is not supported; supported: .*gpt2, llama, mistral, qwen2"),
        ({"model": "alien.json"}, ModelError, r"model_type is 'alien', which transformers does not know"),
        ({"model": "broken.json"}, ModelError, r"broken.json: a model config that is no JSON"),
        ({"model": "folder"}, ModelError, r"folder: looked for model.safetensors .*; found config.json"),
        ({"model": "nothing"}, ModelError, r"nothing at that path; expected .* or one of llama-tiny"),
        ({"tokenizer": "model"}, ValueError, r"tokenizer is 'model', but a built-in model has none; allowed: bytes, b"),
        ({"tokenizer": "bpe", "vocabulary": 99}, ConfigError, r"vocabulary is 99; allowed: 258 to \d+"),
        ({"data": "nothing.txt"}, CorpusError, r"nothing.txt', which does not exist"),
        ({"max_tokens": 200}, CorpusError, r"has 200 tokens, 33 of them held out, so 167 to train on; needed: 257"),
        ({"microbatch_size": 500}, CorpusError, r"needed: 64001, one global batch of 2000 samples"),
        ({"resume": True}, ConfigError, r"resume is set, but '.*run/checkpoints' holds no valid checkpoint$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_name(
    config_files: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for name in ("model", "data"):
        if changes.get(name, "").endswith((".json", "folder", "nothing", ".txt")):
            changes = {**changes, name: str(config_files / changes[name])}
    with pytest.raises(kind, match=message):
        planned(config_files, **changes)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{broken", "network.*JSON"),
        ("[1]", "network is list"),
        ('{"latency_s": [[0]]}', r"network.*\b1\b.*worker"),
        ('{"latency_s": [[0, -1], [0, 0]]}', r"latency_s\[0\]\[1\] is -1"),
        ('{"latency_s": [[0, 1]]}', r"latency_s\[0\] has 2 entries"),
        ("\xff", "network"),
    ],
)
def test_a_network_that_workers_could_not_use_is_refused_before_anything_starts(
    tmp_path: Path, contents: str, message: str
) -> None:
    (tmp_path / "net.json").write_text(contents, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, network=tmp_path / "net.json")


def test_dropout_is_set_everywhere_or_refused() -> None:
    gpt2 = GPT2Config()
    set_dropout(gpt2, TrainConfig(dropout=0.3))
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.3, 0.3, 0.3)
    assert not LayeredModel(_without_dropout(gpt2)).has_dropout
    without: Any = types.SimpleNamespace(model_type="plain")
    with pytest.raises(ConfigError, match=r"^dropout is 0.3; allowed: nothing for plain, which has no dropout$"):
        set_dropout(without, TrainConfig(dropout=0.3))


def _without_dropout(config: GPT2Config) -> GPT2Config:
    set_dropout(config, TrainConfig(dropout=0.0))
    return config


def test_a_fingerprint_is_of_the_shape_and_not_of_the_library() -> None:
    base, same = preset("gpt2-tiny"), preset("gpt2-tiny")
    same.transformers_version, same.use_cache, same.architectures, same._name_or_path = "0", False, ["Other"], "x"
    assert model_fingerprint(base) == model_fingerprint(same) == json.loads(json.dumps(model_fingerprint(base)))
    for name, value in (("n_layer", 5), ("vocab_size", 257), ("tie_word_embeddings", False), ("resid_pdrop", 0.0)):
        other = preset("gpt2-tiny")
        setattr(other, name, value)
        assert model_fingerprint(base) != model_fingerprint(other), name


# ---- resuming ----


def saved(folder: Path, step: int = 3, **changes: Any) -> None:
    """A run folder that has a checkpoint after `step` steps, as far as a plan looks at it."""
    plan = planned(folder, **changes)
    root = folder / "run" / "checkpoints"
    checkpoint.begin(root, step)
    extra = {
        "step": step, "next_sample": 8 * step, "seed": 0, "tokenizer": "bytes",
        "model": model_fingerprint(plan.model.config),
        "data": open_dataset(folder / "run").fingerprint,
    }  # fmt: skip
    checkpoint.commit(root, step, [], extra)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_resuming_goes_on_where_the_checkpoint_stopped(tmp_path: Path) -> None:
    saved(tmp_path)
    damaged = tmp_path / "run" / "checkpoints" / "step-00000004"
    damaged.mkdir()
    for changes in ({}, {"workers": 4, "scheduler": "gpipe"}, {"microbatches": 1, "microbatch_size": 8}):
        plan = planned(tmp_path, resume=True, **changes)
        assert (plan.view.first_step, plan.view.first_sample) == (3, 24)
        assert plan.view.checkpoint == str(damaged.with_name("step-00000003"))
        assert plan.notes == (("step-00000004", "manifest.json is missing"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, r"out is '.*run', which holds checkpoints \(newest: step-00000003\); allowed: --resume to"),
        ({"model": "gpt2-tiny"}, r"cannot resume with another model: .*; .* Use the same model, or another --out"),
        ({"model": "qwen3-tiny"}, r"cannot resume with another model: .*num_key_value_heads was 4 and is 2|model_type"),
        ({"model": "other.json"}, r"another model: num_hidden_layers was 4 and is 3\. Use the same model"),
        ({"dropout": 0.5}, r"another model: attention_dropout was 0.0 and is 0.5\. Use"),
        (
            {"data": "other.txt"},
            r"cannot resume with another data: its fingerprint .*\. Use the same data, --change, or another --out",
        ),
        ({"held_out": 0.5}, r"cannot resume with another data"),
        ({"sequence_length": 16}, r"cannot resume with another data"),
        ({"seed": 1}, r"cannot resume with another seed: it was 0 and is 1"),
        ({"tokenizer": "bpe", "vocabulary": 300}, r"another tokenizer|tokenizer is 'bpe'"),
        ({"steps": 2}, r"steps is 2; .*step 3|step-00000003"),
    ],
)
def test_another_run_is_not_resumed_and_the_run_folder_stays_as_it_was(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path)
    other = preset("llama-tiny", vocab_size=258)
    other.num_hidden_layers, other.bos_token_id, other.eos_token_id, other.pad_token_id = 3, 256, 256, 257
    (tmp_path / "other.json").write_text(json.dumps(other.to_dict()))
    (tmp_path / "other.txt").write_text("something else " * 1500)
    before = contents(tmp_path / "run")
    if (name := next((n for n, v in changes.items() if str(v).startswith("other")), None)) is not None:
        changes = {**changes, name: str(tmp_path / changes[name])}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        planned(tmp_path, **{"resume": True, **changes})
    after = contents(tmp_path / "run")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, "a refused resume wrote to the run folder"


def test_a_folder_of_damaged_checkpoints_is_not_resumed(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no valid checkpoint; step-00000003 is skipped: manifest.json is dam"):
        planned(tmp_path, resume=True)


def test_replace_keeps_settings_frozen() -> None:
    config = TrainConfig()
    with pytest.raises(AttributeError):
        config.workers = 3  # type: ignore[misc]
    assert replace(config, workers=8, replicas=2).stages == 4
    assert replace(config, microbatches=3, microbatch_size=5).samples_per_step == 15
