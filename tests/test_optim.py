"""
Muon against its formulas in float64. AdamW's part, rates and groups: tests/test_parity.py, by what the public
script computes; the share of two ranks: tests/test_train.py.
"""
import pytest
import torch

from optim import POLAR_EXPRESS, MuonAdamW


@pytest.mark.parametrize("rows, cols, warmup", [(40, 24, 0), (24, 40, 2), (32, 32, 0)])
def test_muon_against_its_formulas_in_float64(rows, cols, warmup, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr("optim.STACK", 2 * rows * cols)         # a stack is two of three matrices
    matrices = [(f"m{i}", torch.nn.Parameter(torch.randn(rows, cols))) for i in range(3)]
    W = [p.detach().double().clone() for _, p in matrices]
    M, V = ([torch.zeros(n, dtype=torch.float64) for _ in W] for n in ((rows, cols), max(rows, cols)))
    optimizer = MuonAdamW(matrices, 0.5, momentum_warmup=warmup)
    rates = [(1, 0.7), (0.5, 0.9), (0.2, 1.0), (0.1, 1.0)]
    for step, (lr_mult, wd_mult) in enumerate(rates):
        lr, wd = 0.04 * 0.5 * max(1, rows / cols) ** 0.5 * lr_mult, 1.3 * wd_mult
        momentum = (0.85, 0.90, 0.95, 0.95)[step] if warmup else 0.95
        for i, (_, p) in enumerate(matrices):
            p.grad = torch.randn(rows, cols)
            g = p.grad.double()
            M[i] = momentum * M[i] + (1 - momentum) * g
            u = (1 - momentum) * g + momentum * M[i]
            u = u / u.norm(dim=1, keepdim=True)
            X = u / (1.02 * u.norm() + 1e-6)
            for a, b, c in POLAR_EXPRESS:
                A = X @ X.T
                X = a * X + (b * A + c * A @ A) @ X
            V[i] = 0.95 * V[i] + 0.05 * X.square().mean(dim=1 if rows >= cols else 0)
            Y = X / (V[i][:, None] if rows >= cols else V[i][None, :]).sqrt()
            Y = Y * X.norm() / Y.norm()
            W[i] = W[i] - lr * Y - lr * wd * W[i] * (Y * W[i] >= 0)
        optimizer.step(lr_mult, wd_mult)
    for w, (_, p) in zip(W, matrices):
        assert (p.double() - w).norm() / w.norm() < 1e-3
