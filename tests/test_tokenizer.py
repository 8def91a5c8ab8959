"""Tokenizers made here: every text survives them, transformers loads them, and the same corpus gives the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jobs import tokenizer as module
from jobs.corpus import CorpusError
from jobs.tokenizer import END, PAD, TokenizerError, build_tokenizer
from pipeline.model.weights import PRESETS, preset

TEXTS = [(Path(os.__file__).parent / name).read_text(encoding="utf-8") for name in ("os.py", "ast.py", "glob.py")]
STRANGE = f"def f(x):\n\treturn  x  # é 漢字 🎉 don 't , ok . {END}\r\n\0 \n\n  end "


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_bytes_are_their_own_tokens():
    tokenizer = build_tokenizer("bytes", 0, ())
    everything = "".join(map(chr, range(0x800))) + STRANGE
    assert ids(tokenizer, everything) == list(everything.encode())
    assert tokenizer.decode(ids(tokenizer, everything)) == everything
    assert len(tokenizer) == 258
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)


def test_bpe_has_the_size_asked_for_and_loses_nothing():
    tokenizer = build_tokenizer("bpe", 600, TEXTS)
    assert len(tokenizer) == 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id  # the row of the padding is never learned
    for text in (STRANGE, *TEXTS):
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert len(ids(tokenizer, TEXTS[0])) < 0.5 * len(TEXTS[0])
    assert tokenizer.eos_token_id not in ids(tokenizer, STRANGE)


def test_a_small_corpus_gives_fewer_tokens():
    assert len(build_tokenizer("bpe", 4096, ["aaaa bbbb aaaa"])) < 300


def test_bpe_is_the_same_in_every_process(tmp_path: Path):
    tokenizer = build_tokenizer("bpe", 500, TEXTS)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    program = (
        "import json, sys; from pathlib import Path; from jobs.tokenizer import build_tokenizer\n"
        "texts = json.loads(Path(sys.argv[1]).read_text())\n"
        "print(build_tokenizer('bpe', 500, texts).backend_tokenizer.to_str())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "texts.json")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "TOKENIZERS_PARALLELISM": "true"},
    )  # fmt: skip
    assert json.loads(other.stdout) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_training_reads_a_sample_from_the_whole_corpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SAMPLE_CHARACTERS", 1000)
    read: list[int] = []

    class Texts:
        def __len__(self) -> int:
            return 500

        def __getitem__(self, index: int, /) -> str:
            read.append(index)
            return "word " * 10

    shares: list[float] = []
    build_tokenizer("bpe", 300, Texts(), progress=lambda what, share: shares.append(share))
    assert len(read) == 20
    assert max(read) > 400
    assert min(read) < 100
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" in name] + ["qwen2", "mistral", "gemma"])
def test_a_model_folder_loads_it_whatever_the_model(tmp_path: Path, kind: str, name: str):
    tokenizer = build_tokenizer(kind, 600, TEXTS)
    config = preset(name) if name in PRESETS else preset("llama-tiny")
    config.save_pretrained(tmp_path)
    if name not in PRESETS:
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": name}))
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), build_tokenizer("model", 0, (), tmp_path)):
        assert len(loaded) == len(tokenizer)
        assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        for text in (STRANGE, TEXTS[2]):
            assert ids(loaded, text) == ids(tokenizer, text)
            assert loaded.decode(ids(tokenizer, text)) == text
        assert loaded("def ")["input_ids"] == ids(tokenizer, "def ")  # nothing is put before a prompt


# ---- what is refused ----


def test_what_cannot_be_is_refused(tmp_path: Path):
    with pytest.raises(TokenizerError, match="tokenizer is 'words'; allowed: bytes, bpe, model"):
        build_tokenizer("words", 0, ())
    with pytest.raises(TokenizerError, match="vocabulary is 257; allowed for a bpe: 258 or more"):
        build_tokenizer("bpe", 257, TEXTS)
    with pytest.raises(CorpusError, match="no text to train"):
        build_tokenizer("bpe", 300, [])
    with pytest.raises(TokenizerError, match="a built-in model has none; allowed: bytes, bpe"):
        build_tokenizer("model", 0, (), None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match=r"holds none of tokenizer\.json, .*; allowed: bytes, bpe"):
        build_tokenizer("model", 0, (), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"holds one that does not load: .*; allowed: bytes, bpe"):
        build_tokenizer("model", 0, (), tmp_path)


def test_a_model_without_an_end_is_refused_and_one_without_padding_gets_it(tmp_path: Path):
    tokenizer = build_tokenizer("bytes", 0, ())
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["pad_token"]
    path.write_text(json.dumps(values))
    assert build_tokenizer("model", 0, (), tmp_path).pad_token == END
    del values["eos_token"]
    path.write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="without an end-of-text token"):
        build_tokenizer("model", 0, (), tmp_path)
