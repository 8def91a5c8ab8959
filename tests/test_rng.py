"""Masks against the published generator, against themselves under every regrouping, and against statistics."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.rng import RngKey, derive, keyed_dropout, keyed_mask, random_words

KEY = RngKey(seed=1, step=2, sample_ids=(10, 11, 12, 13))
CPU = torch.device("cpu")


def test_derive_is_the_same_in_another_process_and_separates_its_words():
    code = "from pipeline.model.rng import derive; print(derive(7, 'init', 3))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert derive(7, "init", 3) == int(there)
    different = {derive(7, "init", 3), derive(7, "init", "3"), derive(7, "ini", "t3"), derive(8, "init", 3), derive(7)}
    assert len(different) == 5
    assert all(0 <= value < 1 << 63 for value in different)


def test_words_are_those_of_splitmix64():
    """First outputs for state 1234567, as computed by the reference C code of Sebastiano Vigna."""
    words = random_words(torch.tensor([1234567, 0]), 3)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(word) % (1 << 64) for word in words[0]] == expected
    assert int(words[1, 0]) % (1 << 64) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 5, 5), (4, 1)])
def test_a_sample_has_the_same_mask_in_any_batch(shape: tuple[int, ...]):
    whole = keyed_mask(shape, 0.3, KEY, 5, 0, CPU)
    assert whole.shape == shape
    for rows in ((0, 1), (2, 3), (3, 0), (2,)):
        part = replace(KEY, sample_ids=tuple(KEY.sample_ids[row] for row in rows))
        assert torch.equal(keyed_mask((len(rows), *shape[1:]), 0.3, part, 5, 0, CPU), whole[list(rows)])


def test_masks_differ_by_every_part_of_the_key():
    keys = [
        (KEY, 5, 0),
        (replace(KEY, seed=3), 5, 0),
        (replace(KEY, step=3), 5, 0),
        (replace(KEY, sample_ids=(20, 21, 22, 23)), 5, 0),
        (KEY, 6, 0),
        (KEY, 5, 1),
    ]
    masks = [keyed_mask((4, 4096), 0.5, *key, CPU) for key in keys]
    rows = torch.cat(masks).double() - 0.5
    correlation = (rows @ rows.T) / (0.25 * rows.shape[1]) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 4096**0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_the_rate_and_the_scale_are_right(p: float):
    ones = torch.ones(4, 50_000)
    with keyed_dropout(KEY, 1):
        dropped = functional.dropout(ones, p)
    kept = (dropped > 0).double().mean().item()
    deviation = (p * (1 - p) / ones.numel()) ** 0.5
    assert abs(kept - (1 - p)) < 4 * deviation + 1 / 65536
    assert dropped.max().item() == pytest.approx(1 / (1 - p), rel=0.01)
    neighbours = (dropped[:, :-1] > 0) & (dropped[:, 1:] > 0)
    assert neighbours.double().mean().item() == pytest.approx((1 - p) ** 2, abs=0.005)


def test_the_context_is_what_modules_and_functions_draw_from():
    x = torch.randn(4, 6, 8)
    with keyed_dropout(KEY, 2):
        first, second = nn.Dropout(0.25)(x), functional.dropout(x, p=0.25)
    with keyed_dropout(KEY, 2):
        third = torch.dropout(x, 0.25, True)
        fourth = functional.dropout(x.clone(), 0.25, True, inplace=True)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert not torch.equal(first, second)
    mask = keyed_mask(x.shape, 0.25, KEY, 2, 0, CPU)
    torch.testing.assert_close(first, x * mask / 0.75)


def test_nothing_changes_where_nothing_is_dropped():
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    with keyed_dropout(KEY, 0):
        assert functional.dropout(x, 0.0) is x
        assert functional.dropout(x, 0.5, training=False) is x
        assert nn.Dropout(0.5).eval()(x) is x
        assert functional.dropout(x, 1.0).count_nonzero() == 0
        functional.dropout(x, 0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_call_that_drops_nothing_does_not_shift_the_next():
    x = torch.ones(4, 64)
    with keyed_dropout(KEY, 0):
        functional.dropout(x, 0.0)
        after = functional.dropout(x, 0.5)
    with keyed_dropout(KEY, 0):
        assert torch.equal(after, functional.dropout(x, 0.5))


def test_recomputation_draws_the_same_masks():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        with keyed_dropout(KEY, 3):
            return functional.dropout(functional.dropout(x @ weight, 0.5).tanh() @ weight, 0.3)

    gradients = []
    for again in (False, True):
        y = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if again else run(x)
        (gradient,) = torch.autograd.grad((y**2).sum(), weight)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_a_batch_that_the_key_does_not_name_is_refused():
    with keyed_dropout(KEY, 3), pytest.raises(ValueError, match=r"layer 3.*\(5, 2\).*4 samples"):
        functional.dropout(torch.ones(5, 2), 0.5)


def test_what_cannot_be_keyed_is_refused():
    x = torch.randn(4, 2, 3, 8)
    with keyed_dropout(KEY, 3):
        functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        with pytest.raises(NotImplementedError, match=r"layer 3.*scaled_dot_product_attention.*eager"):
            functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        with pytest.raises(NotImplementedError, match="dropout2d"):
            nn.Dropout2d(0.5)(x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_masks():
    mask = keyed_mask((4, 3, 1001), 0.1, KEY, 5, 0, torch.device("cuda"))
    assert torch.equal(mask.cpu(), keyed_mask((4, 3, 1001), 0.1, KEY, 5, 0, CPU))
