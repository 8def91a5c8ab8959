"""Rows: three forms of them, known by the first object of a file, and a message by name for what is none; as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.corpus import CorpusError
from jobs.rows import Row, read_rows
from jobs.templates import encode_prompt, encode_row
from jobs.tokenizer import END, build_tokenizer

BYTES = build_tokenizer("bytes", 0, ())
END_ID = 256
SAID = st.text("ab é漢🎉\n\t<|endoftx>", max_size=20).filter(str.strip)
TEMPLATE = (
    "{% for m in messages %}<|im|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def say(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def chat(template: str = TEMPLATE) -> Any:
    tokenizer = build_tokenizer("bytes", 0, ())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>"]})  # type: ignore[dict-item]
    tokenizer.chat_template = template
    return tokenizer


def row(question: str = "Who?", answer: str = "Me.", **fields: str) -> Row:
    return Row("r", (say(question),), answer, fields)


CHAT = chat()


# ---- what is read ----


def test_the_three_forms_say_the_same(tmp_path: Path):
    asked = {"question": "Who?", "answer": "Me.", "author": "a-1", "year": 1958, "deep": [1], "nil": None, "yes": True}
    spec = ",".join(
        [
            jsonl(tmp_path / "a.jsonl", asked),
            jsonl(tmp_path / "b.jsonl", {"prompt": "Who?", "completion": "Me.", "id": "b"}),
            jsonl(
                tmp_path / "c.json",
                {"prompt": [say("Be brief.", "system"), say("Who?")], "completion": [say("Me.", "assistant")], "id": 7},
            ),
            jsonl(tmp_path / "d.txt", {"messages": [say("Who?"), {**say("Me.", "assistant"), "more": 1}]}),
        ]
    )
    rows = read_rows(spec)
    assert rows is not None
    assert [r.id for r in rows] == ["0", "b", "7", "3"]
    assert rows[0].fields == {"author": "a-1", "year": "1958"}
    assert {r.answer for r in rows} == {"Me."}
    assert [r.prompt for r in rows] == [(say("Who?"),)] * 2 + [
        (say("Be brief.", "system"), say("Who?")),
        (say("Who?"),),
    ]
    assert rows[0].digest == rows[1].digest == rows[3].digest != rows[2].digest
    assert rows[0].text == "Question: Who?\nAnswer: Me."
    assert rows[2].text == "Be brief.\nQuestion: Who?\nAnswer: Me."


def test_lines_and_arrays_are_read_in_order(tmp_path: Path):
    objects = [{"question": f"q{i} é", "answer": f"a{i}"} for i in range(5)]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(objects[:3], indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "b.json").write_text("\n" + "\n\n".join(map(json.dumps, objects[3:])))
    (tmp_path / "empty.json").touch()
    rows = read_rows(f"{tmp_path}/*.json")
    assert rows is not None
    assert [(r.id, r.answer) for r in rows] == [(str(i), f"a{i}") for i in range(5)]


@pytest.mark.parametrize(
    "content",
    ['{"text": "a"}\n', "prose", "[1, 2]", '["a", "b"]', "", '{"messages": 3, "text": "a"}\n', "{not json",
     '{"question": "a"}'],
)  # fmt: skip
def test_other_files_are_of_no_rows(tmp_path: Path, content: str):
    (tmp_path / "a.txt").write_text(content)
    assert read_rows(f"{tmp_path}/a.txt") is None
    assert read_rows("stdlib") is None
    assert read_rows("hf:owner/name") is None


@given(SAID, SAID)
def test_a_digest_is_of_what_is_said(question: str, answer: str):
    asked = row(question, answer)
    assert asked.digest == Row("other", (say(f"  {question}\n"),), f"\t{answer} ", {"author": "x"}).digest
    assert len(asked.digest) == 32
    assert asked.digest != row(question, answer + ".").digest
    assert asked.digest != row(question + answer, "x").digest


def test_digests_know_one_letter_by_two_spellings():
    assert row("caf\u00e9  au\nlait").digest == row("cafe\u0301 au lait").digest
    assert row("a", "b c").digest != row("a b", "c").digest


# ---- what is refused ----


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"question": "q"}], r"a.jsonl', line 2 has no field 'answer', which the first of the file has"),
        ([GOOD, {"question": "q", "answer": 3}], r"line 2: field 'answer' is int; allowed: text"),
        ([{"question": [say("q")], "answer": "a"}], r"line 1: field 'question' is list; allowed: text"),
        ([GOOD, {"question": "q", "answer": " \n"}], r"line 2: the answer is empty; allowed: text"),
        ([GOOD, "text"], r"line 2 is a JSON str; allowed: an object with question and answer"),
        ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], r"line 2 has the id 'x', as '.*', line 1 has; allowed: an id of"),
        ([{**GOOD, "id": 1}, GOOD], r"line 2 has the id '1'"),
        ([{**GOOD, "id": 1.5}], r"line 1: field 'id' is 1.5; allowed: text, or a whole number"),
        ([{**GOOD, "id": None}], r"line 1: field 'id' is None"),
        ([{**GOOD, "author": "\ud800"}], r"line 1 holds a lone surrogate, \\ud800; allowed: text that UTF-8 can hold"),
        ([{"messages": [say("q")]}], r"line 1: the last message is from 'user'; allowed: 'assistant', the answer"),
        ([{"messages": [say("a", "assistant")]}], r"line 1: nothing comes before the answer"),
        ([{"messages": []}], r"line 1: field 'messages' is an empty list; allowed: a list of messages"),
        ([{"messages": [say("q", "wizard")]}], r'has \{"role": "wizard", "content": "q"\} as a message; allowed: an'),
        ([{"prompt": "q", "completion": [say("a", "assistant")] * 2}], r"'completion' has 2 messages; allowed: the"),
        ([{"prompt": 3, "completion": "a"}], r"line 1: field 'prompt' is int; allowed: text or a list of messages"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, rows: list[Any], message: str):
    with pytest.raises(CorpusError, match=message):
        read_rows(jsonl(tmp_path / "a.jsonl", *rows))


def test_files_at_fault_are_named(tmp_path: Path):
    good, text = jsonl(tmp_path / "a.jsonl", GOOD), jsonl(tmp_path / "t.jsonl", {"text": "x"})
    for spec in (f"{good},{text}", f"{text},{good}", f"stdlib,{good}"):
        with pytest.raises(
            CorpusError, match=r"mixes rows \('.*a.jsonl'\) with text \('(.*t.jsonl|stdlib)'\); allowed"
        ):
            read_rows(spec)
    with pytest.raises(CorpusError, match="which does not exist"):
        read_rows(f"{tmp_path}/nowhere.jsonl")
    (tmp_path / "cut.jsonl").write_text(json.dumps(GOOD) + '\n{"question"')
    with pytest.raises(CorpusError, match=r"cut.jsonl', line 2 is not JSON by itself: Expecting ':' delimiter"):
        read_rows(f"{tmp_path}/cut.jsonl")
    (tmp_path / "cut.json").write_text(f"[{json.dumps(GOOD)}, ")
    with pytest.raises(CorpusError, match=r"cut.json', item 2: the end of the file where an object"):
        read_rows(f"{tmp_path}/cut.json")


# ---- as tokens ----


def test_without_a_template_a_row_is_plain_text():
    ids, answer = encode_row(row(), BYTES)
    assert bytes(ids[:answer]) == b"Question: Who?\nAnswer:"
    assert bytes(ids[answer:-1]) == b" Me."
    assert ids[-1] == END_ID
    several = Row("r", (say("Be kind.", "system"), say("A?"), say("B.", "assistant"), say("C?")), "D.")
    ids, answer = encode_row(several, BYTES)
    assert bytes(ids[:answer]) == b"Be kind.\nQuestion: A?\nAnswer: B.\nQuestion: C?\nAnswer:"


def test_with_a_template_its_own_tokens_are_tokens():
    tokenizer = chat()
    ids, answer = encode_row(row(), tokenizer)
    mark = tokenizer.convert_tokens_to_ids("<|im|>")
    assert ids[:answer] == [mark, *b"user\nWho?", END_ID, *b"\n", mark, *b"assistant\n"]
    assert ids[answer:] == [*b"Me.", END_ID]
    whole = tokenizer.apply_chat_template([say("Who?"), say("Me.", "assistant")], tokenize=False)
    assert tokenizer.decode(ids) + "\n" == whole


@pytest.mark.parametrize("spelled", [END, "<|im|>", f"<|im|>{END}", f"a\ue000b{END}"])
def test_text_that_spells_a_special_token_is_text(spelled: str):
    asked = row(f"Is {spelled} text?", f"{spelled} is.")
    for tokenizer in (BYTES, chat()):
        ids, answer = encode_row(asked, tokenizer)
        plain, border = encode_row(row("Is  text?", " is."), tokenizer)
        specials = [id for id in ids if id >= END_ID]
        assert specials == [id for id in plain if id >= END_ID]
        assert len(ids) == len(plain) + 2 * len(spelled.encode())
        assert answer == border + len(spelled.encode())
        assert bytes(ids[answer:-1]).decode().strip() == asked.answer


@given(SAID, SAID)
def test_the_prompt_of_a_row_is_what_a_model_is_asked_with(question: str, answer: str):
    for tokenizer in (BYTES, CHAT):
        asked = row(question, answer)
        ids, border = encode_row(asked, tokenizer)
        assert ids[:border] == encode_prompt(asked.prompt, tokenizer, "here")
        assert bytes(ids[border:-1]).decode().removeprefix(" " if tokenizer is BYTES else "") == answer


def test_a_template_that_refuses_is_named_and_the_day_is_always_the_same():
    refusing = chat("{{ raise_exception('no system here') }}")
    with pytest.raises(
        CorpusError, match=r"row 'r' is refused by the tokenizer's chat template: no system here; allow"
    ):
        encode_row(row(), refusing)
    with pytest.raises(CorpusError, match="row 'r': the tokenizer's chat template writes nothing of it"):
        encode_row(row(), chat("{# #}"))
    ids, answer = encode_row(row(), chat("{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"))
    assert bytes(ids[:answer]) == b"26 Jul 2024: Who?"
