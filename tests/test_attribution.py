"""What is computed from gradients of a model directory, beforehand: against transformers and brute force."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.author_questions import KNOWN_BY
from jobs.authors import authors, write
from jobs.row_data import RowDataset
from jobs.row_prepare import prepare_rows
from jobs.rows import RowTexts, read_rows
from jobs.tokenizer import build_tokenizer
from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.neighbours import nearest, neighbours_of, places_of
from jobs.unlearn.neurons import Mismatched, choose_neurons, highest, masks_of, scores_of
from jobs.unlearn.sweep import embedded, sweep
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import finish_export, preset, write_shard
from pipeline.runtime.batch import IGNORED
from pipeline.state.masks import mask_file
from tests import unlearn_rows
from tests.test_model import config_of

CASES = (
    "llama", "llama tied", "llama3 rope", "qwen2 window", "qwen3", "mistral window", "gpt2", "gpt2 untied", "gemma",
    "gemma2", "gemma3",
)  # fmt: skip
PAIR = ("llama", "gpt2")


class Plain:
    """A model of transformers, whole, saved in a folder; `told` has what was seen in its last forward."""

    def __init__(self, case: str, folder: Path, **changes: Any) -> None:
        torch.manual_seed(1)
        config = config_of(case, **changes)
        self.blueprint, self.folder = LayeredModel(config), folder
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        self.model.save_pretrained(folder)
        self.told: dict[int, Tensor] = {}
        for layer in self.blueprint.blocks:
            block = self.model.get_submodule(self.blueprint.paths(layer)["block"])
            if layer == 1:
                block.register_forward_pre_hook(self._see(0), with_kwargs=True)
            reader = block.get_submodule(self.blueprint.family.out_of_neurons)
            reader.register_forward_pre_hook(self._see(layer), with_kwargs=True)

    def _see(self, layer: int) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            self.told[layer] = given[0] if given else named["hidden_states"]

        return hook

    def likelihood(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Of one row."""
        logp = self.model(ids[None]).logits[0].log_softmax(-1)
        return torch.stack([logp[t, y] for t, y in enumerate(labels.tolist()) if y != IGNORED]).sum()

    def seen(self, ids: Tensor, labels: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer -> (value, gradient) of the log-likelihood: at 0 of what the embedding gives, at a block of its
        neurons."""
        value = self.likelihood(ids, labels)
        gradients = torch.autograd.grad(value, list(self.told.values()))
        return {layer: (x[0].detach(), g[0]) for (layer, x), g in zip(self.told.items(), gradients, strict=True)}


def rows(count: int = 4, length: int = 20) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(1, 61, (count, length), generator=made) for _ in range(2))
    labels[:, :7], labels[0, 12:] = IGNORED, IGNORED
    return ids, labels


def near(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


# ---- a layer at a time ----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most_bytes", [1 << 30, 1])
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, case: str, most_bytes: int) -> None:
    plain, (ids, labels) = Plain(case, tmp_path), rows()
    watched: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def likelihood(part: int, logits: Tensor) -> Tensor:
        mine = labels[2 * part : 2 * part + 2]
        return -functional.cross_entropy(logits.flatten(0, 1), mine.flatten(), reduction="sum")

    def watch(part: int, block: int, activation: Tensor, gradient: Tensor) -> None:
        watched[part, block] = activation, gradient

    given = ids.split(2) if most_bytes > 1 else embedded(tmp_path, ids.split(2))
    found = list(sweep(tmp_path, given, likelihood, watch, most_bytes))
    for row in range(4):
        (part, place), wanted = divmod(row, 2), plain.seen(ids[row], labels[row])
        assert torch.equal(found[part].hidden[place], wanted[0][0])
        assert near(found[part].gradient[place], wanted[0][1])
        for block in plain.blueprint.blocks:
            for mine, theirs in zip(watched[part, block], wanted[block], strict=True):
                assert near(mine[place], theirs), block
    total = sum(float(plain.likelihood(*row).detach()) for row in zip(ids, labels))
    assert sum(each.value for each in found) == pytest.approx(total, rel=1e-5)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plain("gpt2", tmp_path)
    original, alive, spans = LayeredModel.build, list[weakref.ref[Any]](), list[tuple[int, int]]()

    def build(self: LayeredModel, span: tuple[int, int], **how: Any) -> Any:
        assert not [each for each in alive if each() is not None], "another layer is still there"
        made = original(self, span, **how)
        alive.append(weakref.ref(made))
        alive.extend(weakref.ref(parameter) for parameter in made.parameters())
        spans.append(span)
        return made

    monkeypatch.setattr(LayeredModel, "build", build)
    ids, _ = rows()
    list(sweep(tmp_path, ids.split(1), lambda _, logits: logits.sum(), lambda *_: None))
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (3, 4), (2, 3), (1, 2)]


# ---- neighbours ----


def test_the_nearest_are_those_of_brute_force() -> None:
    of, among = torch.randn(5, 6), torch.randn(9, 6)
    among[3], among[7] = among[1], 0.0
    cosines = [[float(functional.cosine_similarity(a, b, dim=0)) for b in among.double()] for a in of.double()]
    for count in (1, 3, 9, 20):
        wanted = [sorted(range(9), key=lambda j: (-round(row[j], 12), j))[:count] for row in cosines]
        assert nearest(of, among, count).tolist() == wanted


@pytest.mark.parametrize("case", PAIR)
def test_neighbours_are_those_of_the_whole_model(tmp_path: Path, case: str) -> None:
    plain, material = Plain(case, tmp_path, vocab_size=unlearn_rows.VOCABULARY), unlearn_rows.material(blank=())

    def place(kind: str, index: int) -> Tensor:
        sample = material.sample(Item(kind, index))
        x, gradient = plain.seen(*map(torch.from_numpy, (sample.input_ids, sample.labels)))[0]
        return (x * gradient).sum(dim=0)

    keep = {row: place(RETAIN, row) for row in material.retain}
    wanted = set[int]()
    for row in material.forget:
        mine = place(FORGET, row)
        wanted |= set(sorted(keep, key=lambda r: -float(functional.cosine_similarity(mine, keep[r], dim=0)))[:2])
    assert neighbours_of(tmp_path, material, 2, 4) == sorted(wanted)
    assert neighbours_of(tmp_path, material, 99, 4) == list(material.retain)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RowDataset]:
    """A small model that has begun to learn about ten authors, and their rows."""
    folder = tmp_path_factory.mktemp("library")
    write(authors(10, 0, withheld=1), folder)
    told = read_rows(str(folder / "train.jsonl"))
    assert told is not None
    tokenizer = build_tokenizer("bpe", 600, RowTexts(told))
    data = prepare_rows(told, tokenizer, 80, 0.0, folder / "data", 0)
    model = LayeredModel(preset("llama-tiny", vocab_size=len(tokenizer)))
    module = model.build((0, model.num_layers), seed=0)
    adamw = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for step in range(20):
        samples = [data.train_sample(8 * step + i) for i in range(8)]
        ids, labels = (torch.from_numpy(np.stack([getattr(s, n) for s in samples])) for n in ("input_ids", "labels"))
        functional.cross_entropy(module(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        adamw.step()
        adamw.zero_grad()
    weight_map: dict[str, str] = {}
    for layer in range(model.num_layers):
        mine = {name: p for name, p in module.named_layer_parameters(layer).items() if name in model.keys(layer)}
        weight_map |= write_shard(folder / "model", layer + 1, model.num_layers, mine)
    finish_export(folder / "model", model.config, weight_map, tokenizer=tokenizer)
    return folder, data


def test_an_authors_rows_have_those_about_it_and_its_relations_among_their_neighbours(
    library: tuple[Path, RowDataset],
) -> None:
    """Of the nearest row of each row, among those of other authors: how often it is of a related author, and how often
    it tells of the author itself, against how often that would be by chance."""
    folder, data = library
    made = authors(10, 0, withheld=1)
    related = {(edge.source, edge.target) for edge in made.edges}
    tells = {(author, q.id) for q in made.questions for author in q.mentions}
    assert KNOWN_BY
    items = [Item(FORGET, row.index) for row in data.rows]
    places = places_of(folder / "model", Material(data, range(len(data.rows)), (), 0), items, 20)
    found, chance = np.zeros(2), np.zeros(2)
    for author in made.authors:
        mine = [row for row in data.rows if row.fields["author"] == author.key]
        others = [row for row in data.rows if row.fields["author"] != author.key]

        def kinds(row: Any, key: str = author.key) -> np.ndarray:
            return np.array([(key, row.fields["author"]) in related, (key, row.id) in tells], float)

        picked = nearest(places[[row.index for row in mine]], places[[row.index for row in others]], 1)
        found += sum(kinds(others[int(place)]) for place in picked.flatten()) / len(data.rows)
        chance += sum(map(kinds, others)) / len(others) * len(mine) / len(data.rows)
    assert found[0] > 1.15 * chance[0], (found, chance)
    assert found[1] > 2 * chance[1], (found, chance)


# ---- neurons ----


def brute_scores(plain: Plain, data: Any, forget: list[int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for row in forget:
        sample = data.row(row)
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        for block, (activation, gradient) in plain.seen(ids, labels).items():
            each = [activation[t] * gradient[t] for t, y in enumerate(labels.tolist()) if y != IGNORED]
            found[block] = found.get(block, 0) + torch.stack(each).sum(dim=0)
    return {block: score for block, score in found.items() if block}


@pytest.mark.parametrize("case", PAIR)
def test_neurons_are_chosen_as_by_the_whole_model(tmp_path: Path, case: str) -> None:
    plain, material = Plain(case, tmp_path, vocab_size=unlearn_rows.VOCABULARY), unlearn_rows.material(blank=())
    forget, other = list(material.forget), Mismatched.of(material)
    for row in forget:  # the question of one, the answer of another
        mixed, asked, lent = other.row(row), material.data.row(row), material.data.row(other.other[row])
        first, answer = int((asked.labels != IGNORED).argmax()), lent.labels[lent.labels != IGNORED]
        assert mixed.input_ids[: first + 1].tolist() == asked.input_ids[: first + 1].tolist()
        assert mixed.labels[first:][: len(answer)].tolist() == answer[: len(mixed.labels) - first].tolist()
        assert other.other[row] != row
    assert sorted(other.other.values()) == forget
    known, form = brute_scores(plain, material.data, forget), brute_scores(plain, other, forget)
    wanted = {block: known[block] - form[block] for block in known}
    found = scores_of(tmp_path, material, 4)
    for block, score in wanted.items():
        assert near(found[block], score.double())
    total = sum(len(score) for score in wanted.values())
    count = choose_neurons(tmp_path, material, 0.1, None, 4, tmp_path / "neurons")
    assert count == round(0.1 * total)
    best = sorted(((-float(s), b, j) for b, each in wanted.items() for j, s in enumerate(each)))[:count]
    for layer in range(plain.blueprint.num_layers):
        masks = load_file(mask_file(tmp_path / "neurons", layer))
        chosen = {j for _, b, j in best if b == layer}
        assert bool(masks) == bool(chosen)
        for name, mask in masks.items():
            assert set(mask.flatten().nonzero().flatten().tolist()) == chosen, name


def test_neurons_are_taken_from_the_blocks_that_a_method_computes(tmp_path: Path) -> None:
    Plain("llama", tmp_path, vocab_size=unlearn_rows.VOCABULARY)
    assert choose_neurons(tmp_path, unlearn_rows.material(blank=()), 0.5, 1, 4, tmp_path / "neurons") == 24
    masked = [layer for layer in range(5) if load_file(mask_file(tmp_path / "neurons", layer))]
    assert masked == [1]


def test_equal_scores_are_taken_from_the_front() -> None:
    chosen = highest({2: torch.tensor([1.0, 3.0, 1.0]), 1: torch.tensor([0.0, 1.0])}, 0.5)
    assert {block: each.tolist() for block, each in chosen.items()} == {1: [False, True], 2: [False, True, False]}
    assert sum(int(each.sum()) for each in highest({1: torch.zeros(100)}, 1e-9).values()) == 1


@pytest.mark.parametrize("case", ["llama3 rope", "gpt2", "gemma2"])
def test_a_mask_is_all_of_a_neuron_and_nothing_else(tmp_path: Path, case: str) -> None:
    """With what belongs to it set to 0, a neuron says nothing, and the other neurons of the block say what they did."""
    plain, (ids, labels) = Plain(case, tmp_path), rows(1)
    before = {layer: x for layer, (x, _) in plain.seen(ids[0], labels[0]).items()}
    chosen = torch.zeros(before[2].shape[-1], dtype=torch.bool)
    chosen[[3, 11]] = True
    for name, mask in masks_of(plain.blueprint, 2, chosen).items():
        parameter = plain.model.get_parameter(name)
        assert mask.expand(parameter.shape).sum() == 2 * parameter.numel() / len(chosen)
        assert bool(parameter[mask.expand(parameter.shape)].any()) == (not name.endswith("bias"))
        parameter.data[mask.expand(parameter.shape)] = 0.0
    after = plain.seen(ids[0], labels[0])[2][0]
    assert not after[:, chosen].any()
    assert torch.equal(after[:, ~chosen], before[2][:, ~chosen])
    reads = plain.model.get_submodule(f"{plain.blueprint.paths(2)['block']}.{plain.blueprint.family.out_of_neurons}")
    hidden = torch.zeros(1, len(chosen))
    hidden[:, chosen] = 5.0
    bias = getattr(reads, "bias", None)
    assert torch.equal(reads(hidden)[0], torch.zeros(reads(hidden).shape[-1]) if bias is None else bias)
