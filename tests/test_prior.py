"""The prior against brute force over a grid of the simplex (independent of the solver)."""
import itertools

import torch

from prior import fit_weights


def random_log_p(members, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, generator=g) * 1.5 - 3
    return (base + 0.6 * torch.randn(members, tokens, generator=g)).clamp(max=-1e-3)


def test_fit_beats_every_point_of_a_grid():
    log_p = random_log_p(3, 200)
    weights, gap = fit_weights(log_p)
    loss = lambda w: -(torch.as_tensor(w, dtype=torch.float64) @ log_p.double().exp()).log().mean()
    grid = [(i / 40, j / 40, 1 - (i + j) / 40) for i, j in itertools.product(range(41), repeat=2) if i + j <= 40]
    best = min(loss(w) for w in grid)
    assert loss(weights) <= best + 1e-12
    assert loss(weights) >= best - 1e-3         # and the grid comes close: no other objective was minimised
    assert 0 <= gap + 1e-12 and gap <= 1e-7
