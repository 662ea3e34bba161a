"""The factor of the inverse Hessian: in blocks as in one piece, and in place."""

from __future__ import annotations

import pytest
import torch

from agq_gguf.matrix import factor
from agq_gguf.matrix.simulate import rotate_in_place, rotated


def some_hessian(n: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed))
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(0.01)
    return hessian


@pytest.mark.parametrize("n", [64, 192, 320, 577])
def test_blocks_give_what_one_piece_gives(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = some_hessian(n)
    whole = factor.inverse_factor(hessian.clone())
    assert whole is not None
    torch.testing.assert_close(whole.T @ whole, torch.linalg.inv(hessian), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(factor, "_BLOCK", 63)
    given = hessian.clone()
    blocks = factor.inverse_factor(given)
    assert blocks is given  # in place
    torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-4)
    assert not blocks.tril(-1).any()


@pytest.mark.parametrize("block", [16, 1024])
def test_a_hessian_without_a_factor(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "_BLOCK", block)
    for bad in (-torch.eye(64), torch.full((64, 64), torch.nan), torch.zeros(64, 64)):
        assert factor.inverse_factor(bad) is None


@pytest.mark.parametrize("n", [1, 64, 130])
def test_reordering(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "_BLOCK", 50)
    matrix = torch.randn(n, n)
    for order in (torch.randperm(n), torch.arange(n), torch.arange(n).flip(0), torch.arange(n).roll(1)):
        wanted = matrix[order][:, order]
        assert torch.equal(factor.reordered(matrix, order), wanted)
        moved = matrix.clone()
        factor.reorder_in_place(moved, order)
        assert torch.equal(moved, wanted)


def test_rotating_in_place() -> None:
    hessian = some_hessian(192)
    wanted = rotated(rotated(hessian).T)
    rotate_in_place(hessian)
    torch.testing.assert_close(hessian, wanted)
