"""Output projections fitted in closed form: the formula, the ridge that is chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.model import output_fit
from pipeline.model.output_fit import fit_outputs
from tests.passed_blocks import LLAMA, blocks, pairs_of


@pytest.mark.parametrize("ridge", output_fit.RIDGES)
def test_each_projection_solves_its_weighted_ridge_regression(monkeypatch: pytest.MonkeyPatch, ridge: float) -> None:
    """Against least squares in float64 over the stacked rows, of the first projection of the first block."""
    monkeypatch.setattr(output_fit, "RIDGES", (ridge,))
    teacher, student = blocks(LLAMA, 0), blocks(LLAMA, 1)
    pairs = pairs_of(teacher, 8)
    taken: list[Tensor] = []
    projection = student.layers["2"].get_submodule("self_attn.o_proj")
    handle = projection.register_forward_hook(lambda _, given, __: taken.append(given[0].detach()))
    with torch.no_grad():
        for pair in pairs:
            student.block(2, pair.x)
    handle.remove()
    f = torch.cat([each.flatten(0, 1) for each in taken]).double()
    y, x = (torch.cat([getattr(p, side).flatten(0, 1) for p in pairs]).double() for side in ("y", "x"))
    weight = 1 / y.square().mean(-1).sqrt()
    scaled = ridge * float((f * f * weight[:, None]).sum(0).mean())
    rows = torch.cat([f * weight.sqrt()[:, None], scaled**0.5 * torch.eye(f.shape[1], dtype=torch.double)])
    wanted = torch.cat([(y - x) * weight.sqrt()[:, None], torch.zeros(f.shape[1], 16, dtype=torch.double)])
    expected = torch.linalg.lstsq(rows, wanted).solution / 4  # four projections share what is missing
    fit_outputs(student, pairs, pairs_of(teacher, 2, seed=1))
    found = student.layers["2"].get_submodule("self_attn.o_proj").get_parameter("weight").detach()
    assert float((found.T.double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_withheld_pairs_choose_the_strongest_ridge_that_is_nearly_the_best() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 40, 6, generator=draw)
    features[..., 3:] = features[..., :3] + 1e-3 * torch.randn(2, 40, 3, generator=draw)  # much alike
    targets = features[..., :3] @ torch.randn(3, 4, generator=draw) + 0.3 * torch.randn(2, 40, 4, generator=draw)
    weights = torch.rand(2, 40, generator=draw) + 0.5
    fitted, judged = output_fit._System(), output_fit._System()
    fitted.add(features[:1], targets[:1], weights[:1])
    judged.add(features[1:], targets[1:], weights[1:])
    found = {ridge: fitted.solve(ridge) for ridge in output_fit.RIDGES}
    errors = {
        ridge: float(((features[1] @ w - targets[1]).square().sum(-1) * weights[1]).sum()) for ridge, w in found.items()
    }
    for ridge, w in found.items():
        assert judged.error(w) == pytest.approx(errors[ridge], rel=1e-4)
    nearly = [ridge for ridge, error in errors.items() if error <= output_fit.NEARLY * min(errors.values())]
    assert torch.equal(output_fit._solved(fitted, judged), found[max(nearly)])
    assert found[1e-1].norm() < found[1e-3].norm()
