"""The prior against brute force over a grid, expectation maximisation in float64, and what must hold for any mixture."""
import itertools
import math

import numpy as np
import pytest
import torch

from prior import answers_for, fit_weights, mixture_losses


def log_probabilities(members, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, generator=g) * 1.5 - 3
    handicap = torch.linspace(0, 0.25, members)[torch.randperm(members, generator=g)]
    return (base + 0.6 * torch.randn(members, tokens, generator=g) - handicap[:, None]).clamp(max=-1e-3)


def loss(w, log_p):
    return -(torch.as_tensor(w, dtype=torch.float64) @ log_p.double().exp()).log().mean().item()


def check(log_p):
    """A fit's weights, after what must hold for each."""
    before = log_p.clone()
    w, gap = fit_weights(log_p)
    assert torch.equal(log_p, before) and w.dtype == torch.float64
    assert abs(w.sum().item() - 1) < 1e-12 and (w >= 0).all() and gap <= 1e-7
    p = log_p.double().exp()
    assert gap == pytest.approx((p / (w @ p)).mean(dim=1).max().item() - 1, abs=1e-9)
    return w


def test_no_point_of_a_grid_is_better():
    log_p = log_probabilities(3, 200)
    w = check(log_p)
    grid = [(i / 60, j / 60, 1 - (i + j) / 60) for i, j in itertools.product(range(61), repeat=2) if i + j <= 60]
    best = min(grid, key=lambda v: loss(v, log_p))
    assert loss(w, log_p) <= loss(best, log_p) + 1e-12
    assert torch.allclose(w, torch.tensor(best, dtype=torch.float64), atol=1 / 30)


@pytest.mark.parametrize("members, tokens, seed", [(2, 50, 1), (8, 1000, 2), (40, 3000, 3), (64, 40, 4)])
def test_expectation_maximisation_ends_where_the_fit_does(members, tokens, seed):
    log_p = log_probabilities(members, tokens, seed)
    w, p = torch.full((members,), 1 / members, dtype=torch.float64), log_p.double().exp()
    for _ in range(3000):
        w = w * (p / (w @ p)).mean(dim=1)
    mine = check(log_p)
    assert loss(mine, log_p) <= loss(w, log_p) + 1e-9
    assert loss(mine, log_p) >= loss(w, log_p) - 2e-4           # EM is slow where weights go to 0


def test_the_order_of_members_does_not_matter():
    log_p, order = log_probabilities(9, 500), torch.randperm(9, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(check(log_p)[order], check(log_p[order]), atol=1e-6)


def test_copies_change_no_loss_and_another_member_never_hurts():
    log_p = log_probabilities(6, 400)
    optimum = loss(check(log_p), log_p)
    doubled = torch.cat([log_p, log_p[:3], log_p[:1]])
    assert loss(check(doubled), doubled) == pytest.approx(optimum, abs=1e-7)
    for extra in (log_probabilities(1, 400, 9), log_p.mean(dim=0, keepdim=True) - 3):
        more = torch.cat([log_p, extra])
        assert loss(check(more), more) <= optimum + 1e-7


def test_one_member_is_a_population():
    log_p = log_probabilities(1, 30)
    assert check(log_p).tolist() == [1.0]
    answers, _ = answers_for(log_p)
    assert {(rule, len(m)) for rule, m, _ in answers} == {("best", 1), ("uniform", 1), ("topk", 1), ("learned", 1)}


def test_a_probability_of_zero_breaks_nothing():
    log_p = log_probabilities(5, 300)
    log_p[2, 7], log_p[:, 11], log_p[0] = -math.inf, -math.inf, -2000.0
    w, gap = fit_weights(log_p)
    assert gap <= 1e-7 and w[0] == 0 and torch.isfinite(w).all()
    kept = torch.arange(300) != 11                              # a token that nobody expects weighs nothing
    assert loss(w, log_p[:, kept]) == pytest.approx(loss(check(log_p[1:, kept]), log_p[1:, kept]), abs=1e-5)


def test_equal_members_of_equal_loss():
    log_p = log_probabilities(1, 100).repeat(4, 1)
    w, gap = fit_weights(log_p)
    assert abs(gap) < 1e-12 and w.sum() == pytest.approx(1)


def test_answers_follow_their_rules():
    log_p = log_probabilities(11, 800)
    losses, w = -log_p.double().mean(dim=1), check(log_p)
    answers, _ = answers_for(log_p)
    of = {(rule, len(m)): (m, v) for rule, m, v in answers}
    assert sorted(K for rule, K in of if rule == "learned") == [1, 2, 4, 8, 11]
    assert of["best", 1][0].tolist() == [losses.argmin()]
    for K in (1, 2, 4, 8, 11):
        members, weights = of["uniform", K]
        assert sorted(members.tolist()) == sorted(losses.argsort()[:K].tolist()) and set(weights.tolist()) == {1 / K}
        members, weights = of["topk", K]
        assert w[members].min() >= w[[i for i in range(11) if i not in members]].max() if K < 11 else True
        assert torch.allclose(weights, w[members] / w[members].sum())
        learned, refitted = of["learned", K]
        assert learned.tolist() == members.tolist()
        assert loss(refitted, log_p[members]) <= loss(weights, log_p[members]) + 1e-9
    # with so many members that no subset of two beats it by brute force over pairs of the same choice
    assert loss(of["learned", 11][1], log_p[of["learned", 11][0]]) == pytest.approx(loss(w, log_p), abs=1e-7)


def test_mixture_losses_against_the_plain_formula():
    log_p = log_probabilities(5, 20_000)                        # several blocks
    sizes = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.uint8)
    answers, _ = answers_for(log_p)
    for (rule, members, w), (nats, bits) in zip(answers, mixture_losses(answers, list(log_p.numpy()), sizes)):
        each = -(w @ log_p[members].double().exp()).log()
        assert nats == pytest.approx(each.mean().item(), rel=1e-12)
        assert bits == pytest.approx(each[torch.from_numpy(sizes > 0)].sum().item() / (math.log(2) * sizes.sum(dtype=int)), rel=1e-12)
