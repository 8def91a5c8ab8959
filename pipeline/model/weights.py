"""Where a model comes from and goes to: a built-in shape, a config file, a directory of safetensors, or a GGUF file.

Reading goes through the index of the safetensors, so that a worker reads the tensors of its own spans and no others.
Writing is by shard: every worker writes what it holds, one of them adds the index and the config, and the directory
appears under its name in one rename. The layout is that of transformers' `save_pretrained`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.model.config import SizeError, check_fields, check_together
from pipeline.model.hub import cached, how_to_have
from pipeline.reading import FileError, read_json, read_toml

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelError(ValueError):
    """A model that cannot be found, read, built or written. The message says what was asked, found and allowed."""


class Tokenizer(Protocol):
    """What an export needs of a tokenizer."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _llama(dim: int, layers: int, heads: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": inner, "vocab_size": vocab,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, **_NO_TOKENS, **more,
    }  # fmt: skip


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama-tiny": _llama(64, 4, 4, 128, 256),
    "llama-2m": _llama(128, 8, 4, 352, 1024),
    "llama-17m": _llama(384, 8, 6, 1024, 4096),
    "gpt2-tiny": {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 256, "n_positions": 512,
        **_NO_TOKENS,
    },
    "qwen3-tiny": {**_llama(64, 4, 4, 128, 256, num_key_value_heads=2), "model_type": "qwen3", "head_dim": 16},
    "smollm2-135m": _llama(
        576, 30, 9, 1536, 49152, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5, bos_token_id=0,
        eos_token_id=0, initializer_range=1 / 24,
    ),
}  # fmt: skip
"""Built-in shapes by name, as the contents of a config.json; weights are random."""


def watch(source: Path | None) -> Callable[[], str]:
    """Says, when it is called later, how the weights in the directory `source` have changed since, or "" where they
    are as they were. Random weights (None) never change."""
    before = _stamps(source)

    def changed() -> str:
        now = _stamps(source)
        gone = [name for name in before if now.get(name) != before[name]]
        return f"{source} has changed: {_some(set(gone))}" if gone else ""

    return changed


def _stamps(source: Path | None) -> dict[str, tuple[int, int]]:
    if source is None or not source.is_dir():
        return {}
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in source.glob("*.safetensors")}


# ---- configs ----


def preset(name: str, *, vocab_size: int | None = None) -> PreTrainedConfig:
    """The built-in shape `name`, with another vocabulary size if one is given. Raises ModelError."""
    if name not in PRESETS:
        raise ModelError(f"no built-in model is called {name!r}; there are {', '.join(PRESETS)}")
    values = dict(PRESETS[name])
    return _config(values if vocab_size is None else {**values, "vocab_size": vocab_size}, f"preset {name!r}")


def read_config(path: str | Path) -> PreTrainedConfig:
    """The config in a directory's config.json, or in a JSON or TOML file with the same fields. Raises ModelError."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = read_toml(file) if file.suffix == ".toml" else read_json(file)
    except FileError as error:
        raise ModelError(f"{file}: a model config that {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: a model config is a table of fields; found {type(values).__name__}")
    return _config(values, str(file))


def _config(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{where}: model_type is {kind!r}, which transformers does not know; e.g. 'llama' is one")
    try:
        check_fields(values, CONFIG_MAPPING[kind].attribute_map)
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(values)))
        check_together(config, values)
        return config
    except SizeError as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # the checks of config classes raise errors of many unrelated classes
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{where}: transformers refuses these fields for {kind!r}: {told}") from error


def has_weights(model: str) -> bool:
    """Whether `model`, as `resolve` takes it, brings weights along: it is a directory, an id or a GGUF file."""
    path = Path(model)
    if model in PRESETS:
        return False
    return path.is_dir() or (path.suffix == ".gguf" and path.is_file()) or cached(model) is not None


def drawn(model: str) -> bool:
    """Whether `model`, as `resolve` takes it, is a shape alone, whose weights are drawn: a preset or a config file."""
    return model in PRESETS or Path(model).suffix in (".json", ".toml")


def resolve(model: str | Path, cache: Path, *, vocab_size: int | None = None) -> Path | PreTrainedConfig:
    """What `model` names: a directory of safetensors to load, or a config to fill with random weights.

    Accepted are a preset's name, a .json or .toml config file, a directory with config.json and safetensors, the id of
    one in the local cache of Hugging Face, and a .gguf file, which is converted once into a directory under `cache`.
    `vocab_size` replaces that of a config; weights keep their own. Raises ModelError, which says what was looked for
    and found.
    """
    path = Path(model)
    if str(model) in PRESETS:
        return preset(str(model), vocab_size=vocab_size)
    if path.is_dir():
        read_config(path)
        Weights(path)
        return path
    if path.suffix == ".gguf" and path.is_file():
        return convert_gguf(path, cache)
    if path.suffix in (".json", ".toml") and path.is_file():
        config = read_config(path)
        if vocab_size is not None:
            config.vocab_size = vocab_size
        return config
    if (found := cached(str(model))) is not None:
        try:
            read_config(found)
            Weights(found)
        except ModelError as error:
            raise ModelError(f"model {str(model)!r} is not whole: {error}{how_to_have(str(model))}") from error
        return found
    found = "a file that is none of these" if path.exists() else "nothing at that path"
    raise ModelError(
        f"model {str(model)!r}: found {found}; expected a directory with config.json and safetensors, a .gguf file, "
        f"a config as .json or .toml (random weights), or one of {', '.join(PRESETS)}{how_to_have(str(model))}"
    )


# ---- reading ----


class Weights:
    """The tensors of a directory of safetensors, by name; opened when read. Raises ModelError when it is not whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        single, index = self.directory / _SINGLE, self.directory / _INDEX
        if single.is_file():
            expected: dict[Path, set[str] | None] = {single: None}
        elif index.is_file():
            expected = _read_index(index)
        else:
            found = sorted(p.name for p in self.directory.iterdir()) if self.directory.is_dir() else []
            raise ModelError(
                f"{self.directory}: looked for {_SINGLE} or {_INDEX}; found {', '.join(found[:12]) or 'nothing'} "
                "(for random weights, pass the config.json itself)"
            )
        self.files: dict[str, Path] = {}
        for file, names in expected.items():
            held = _names(file)
            if names is not None and (absent := names - held):
                raise ModelError(f"{file}: {index.name} puts {_some(absent)} here, but the file does not hold them")
            self.files.update(dict.fromkeys(held, file))

    def read(
        self, wanted: Mapping[str, tuple[str, ...]], dtype: torch.dtype | None = torch.float32
    ) -> dict[str, Tensor]:  # fmt: skip
        """Name -> tensor on the CPU, in `dtype`, or as it is stored under None. `wanted[name]` are the names it may be
        stored under, best first."""
        stored = {name: next((n for n in names if n in self.files), None) for name, names in wanted.items()}
        if absent := {name for name, found in stored.items() if found is None}:
            raise ModelError(
                f"{self.directory}: no tensor for {_some(absent)}; the safetensors hold {len(self.files)} others, "
                f"e.g. {_some(self.files)}"
            )
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name, found in stored.items():
            assert found is not None
            by_file.setdefault(self.files[found], []).append((name, found))
        tensors: dict[str, Tensor] = {}
        for file, pairs in by_file.items():
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(found).to(dtype) for name, found in pairs})
        return tensors


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map = read_json(index)["weight_map"]
        pairs = [(str(name), index.parent / str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors: {error!r}") from error
    expected: dict[Path, set[str] | None] = {file: {n for n, f in pairs if f == file} for file in {f for _, f in pairs}}
    if absent := {file.name for file in expected if not file.is_file()}:
        raise ModelError(f"{index} names {len(expected)} files; not there: {_some(absent)}")
    return dict(sorted(expected.items()))


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: truncated or not a safetensors file ({error})") from error


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


# ---- GGUF ----


def convert_gguf(file: Path, cache: Path) -> Path:
    """The directory under `cache` with the fp32 weights, config and tokenizer of a GGUF file; made at the first call.

    The name carries a hash of the contents, so another file never meets an old conversion. Quantised tensors are
    expanded. Raises ModelError if the packages for it are missing or transformers cannot read the file.
    """
    if lacking := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(f"{file}: reading GGUF needs {' and '.join(lacking)}; pip install 'unbroken[gguf]'")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    target = cache / f"{file.stem}-{digest}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{file.stem}-", dir=cache))
    try:
        _convert(file, staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same contents
                raise
    except ModelError:
        raise
    except Exception as error:  # transformers and gguf raise errors of many classes for a bad file
        raise ModelError(f"{file}: transformers cannot convert this GGUF file: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(file: Path, directory: Path) -> None:
    from gguf import GGUFReader  # an extra: only those who read GGUF need it

    needed, free = 4 * sum(int(t.n_elements) for t in GGUFReader(file).tensors), shutil.disk_usage(directory).free
    if needed > free:
        raise ModelError(
            f"{file}: its weights in fp32 take {needed} bytes; {free} are free in {str(directory.parent)!r}"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    weight_map = write_shard(directory, 1, 1, tensors)
    tokenizer = None
    if "tokenizer.ggml.tokens" in GGUFReader(file).fields:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    finish_export(directory, model.config, weight_map, tokenizer=tokenizer)


# ---- writing ----


def write_shard(directory: Path, index: int, total: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write `tensors` as shard `index` (from 1) of `total`; returns name -> file name, for `finish_export`.

    Different workers may write different shards of one directory at the same time.
    """
    if not 1 <= index <= total:
        raise ModelError(f"shard {index} of {total}; shards are numbered from 1")
    directory.mkdir(parents=True, exist_ok=True)
    name = f"model-{index:05d}-of-{total:05d}.safetensors"
    unfinished = directory / f".{name}.partial"
    try:
        host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(host, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, directory / name)
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))
        why = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{directory / name} cannot be written: {why}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return dict.fromkeys(tensors, name)


def finish_export(
    directory: Path, config: PreTrainedConfig, weight_map: Mapping[str, str], *, keys: Iterable[str] = (),
    tokenizer: Tokenizer | None = None, into: Path | None = None,
) -> Path:  # fmt: skip
    """Add index, config, generation config and tokenizer to a directory of shards; returns where the model lies.

    `weight_map` joins what all `write_shard` returned; `keys` are names it must cover. With `into`, the directory
    takes that name in one rename, and a model that had it before is removed after. Raises ModelError if a tensor of
    the map or of `keys` is in no shard.
    """
    if absent := set(keys) - set(weight_map):
        raise ModelError(f"{directory}: no worker wrote {_some(absent)}, which would load as random weights")
    total_size, dtypes = 0, set[torch.dtype]()
    for name in sorted(set(weight_map.values())):
        held = _names(directory / name)
        if absent := {key for key, file in weight_map.items() if file == name} - held:
            raise ModelError(f"{directory / name} lacks {_some(absent)}")
        with safe_open(directory / name, framework="pt") as opened:
            slices = [opened.get_slice(key) for key in held]  # headers only
        total_size += sum(math.prod(part.get_shape()) * _DTYPES[part.get_dtype()].itemsize for part in slices)
        dtypes |= {_DTYPES[part.get_dtype()] for part in slices}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # the weights written here are not quantised any more
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config.save_pretrained(str(directory))
    GenerationConfig.from_model_config(config).save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory if into is None else _move(directory, into)


def write_model(
    into: Path, config: PreTrainedConfig, shards: Iterable[Mapping[str, Tensor]], total: int, tokenizer: Path
) -> None:  # fmt: skip
    """Write a model directory by one process, of at most `total` shards, which are taken one after another: an empty
    one has no file. `tokenizer` is a folder. Raises ModelError."""
    unfinished, weight_map = into.with_name(f"{into.name}.tmp"), dict[str, str]()
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, tensors in enumerate(shards, 1):
        if tensors:
            weight_map |= write_shard(unfinished, number, total, tensors)
    finish_export(unfinished, config, weight_map, tokenizer=AutoTokenizer.from_pretrained(tokenizer), into=into)


def _move(directory: Path, into: Path) -> Path:
    into.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{into.name}-old-", dir=into.parent))
    try:
        if into.exists():
            into.rename(aside / "model")
        directory.rename(into)
    except OSError:
        if (aside / "model").exists():
            (aside / "model").rename(into)
        aside.rmdir()  # fails, and so keeps the old model, if it could not be put back
        raise
    shutil.rmtree(aside)
    return into
