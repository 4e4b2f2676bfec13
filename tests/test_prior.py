"""The prior against brute force over a grid, expectation maximisation in float64, and what must hold for any mixture."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prior import (Probabilities, answers_for, eliminate, exchange, fit_weights, growing, mixture_losses, paired_error,
                   reported)


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
    rules, _ = answers_for(log_p)
    assert {rule: [(m.tolist(), w.tolist()) for m, w in answers] for rule, answers in rules.items()} == dict.fromkeys(
        rules, [([0], [1.0])])


def test_a_probability_of_zero_breaks_nothing():
    log_p = log_probabilities(5, 300)
    log_p[2, 7], log_p[:, 11], log_p[0] = -math.inf, -math.inf, -2000.0
    w, gap = fit_weights(log_p)
    assert gap <= 1e-7 and w[0] == 0 and torch.isfinite(w).all()
    kept = torch.arange(300) != 11                              # a token that nobody expects weighs nothing
    assert loss(w, log_p[:, kept]) == pytest.approx(loss(check(log_p[1:, kept]), log_p[1:, kept]), abs=1e-5)


def test_members_that_know_different_tokens():
    """Each gives the others' tokens no chance: from any single one the others look infinitely better."""
    for members, tokens in ((10, 300), (100, 1000)):
        knows = torch.arange(tokens) % members == torch.arange(members)[:, None]
        w, gap = fit_weights(torch.where(knows, -0.01, -math.inf))
        assert gap <= 1e-7 and w.tolist() == pytest.approx([1 / members] * members, abs=1e-5)


@pytest.mark.parametrize("low", [-60.0, -110.0, -250.0, -700.0, -math.inf])
def test_tokens_that_a_needed_member_gives_no_chance(low):
    log_p = log_probabilities(6, 1000)
    log_p[torch.rand(6, 1000, generator=torch.Generator().manual_seed(1)) < 0.002] = low
    best = log_p.clamp(min=-700).double().mean(dim=1).argmax()
    log_p[best, 17] = low                                       # also where the fit starts
    w, gap = fit_weights(log_p)
    assert gap <= 1e-7 and (w > 0).sum() >= 3
    identity = torch.where(torch.eye(6).repeat(1, 20) > 0, -0.1, low)
    assert fit_weights(identity)[0].tolist() == pytest.approx([1 / 6] * 6, abs=1e-5)


@pytest.mark.parametrize("worse", [8.0, 10.0, 46.0, math.inf])
def test_a_poor_member_that_alone_expects_a_token(worse):
    """Its weight is small, its curvature large: where the fit must not stop early, nor float32 overflow."""
    for seed in range(12):
        log_p = log_probabilities(1, 3000, seed) + 0.3 * torch.randn(3, 3000, generator=torch.Generator().manual_seed(seed))
        log_p[-1] -= 1
        log_p[:-1, 7] -= worse
        check(log_p) if worse < 40 else fit_weights(log_p)


@pytest.mark.parametrize("seed", range(12))
def test_members_far_apart_and_copied(seed):
    """Probabilities over forty orders of magnitude, each member two or three times: singular, and ill-conditioned."""
    g = torch.Generator().manual_seed(seed)
    log_p = (12 * torch.randn(12, 60 + 20 * seed, generator=g) - 10).clamp(-41, -1e-4).repeat(2 + seed % 2, 1)
    w, gap = fit_weights(log_p)
    assert gap <= 1e-7 and abs(w.sum().item() - 1) < 1e-12
    once, _ = fit_weights(log_p[:12])
    assert loss(w, log_p) == pytest.approx(loss(once, log_p[:12]), abs=2e-7)
    if seed < 2:
        rules, _ = answers_for(log_p)
        assert all(torch.isfinite(v).all() for answers in rules.values() for _, v in answers)


def test_equal_members_of_equal_loss():
    log_p = log_probabilities(1, 100).repeat(4, 1)
    w, gap = fit_weights(log_p)
    assert abs(gap) < 1e-12 and w.sum() == pytest.approx(1)


def real_scores():
    """
    Of the 32 members of configs/tiny.py (seed 42), every 32nd token of the fitness set: (32, 508) float32.
    """
    return torch.from_numpy(np.load(Path(__file__).with_name("data") / "fitness_scores.npy")).float()


def specialised():
    """Of 20 members each knows every twentieth token."""
    knows = torch.arange(300) % 20 == torch.arange(20)[:, None]
    return torch.where(knows, -0.1, -8.0) - 0.1 * torch.rand(20, 300, generator=torch.Generator().manual_seed(0))


def best_subset(log_p, subsets):
    """The lowest loss of the fits on these subsets."""
    return min(loss(fit_weights(log_p[s])[0], log_p[s]) for s in subsets)


@pytest.mark.parametrize("log_p", [real_scores(), log_probabilities(12, 300, 3), log_probabilities(70, 200, 4), specialised()],
                         ids=["real", "12 made up", "70 made up", "specialised"])
def test_learned_is_never_behind(log_p):
    """At every K not behind K - 1 or another rule; up to 8 and where reported no exchange lowers it."""
    rules, _ = answers_for(log_p)
    losses = {rule: [loss(w, log_p[members]) for members, w in answers] for rule, answers in rules.items()}
    everyone, n = set(range(len(log_p))), len(log_p)
    for K, ((members, _), mine) in enumerate(zip(rules["learned"], losses["learned"]), 1):
        others = [losses["best"][0], losses["uniform"][K - 1], losses["topk"][K - 1], *losses["learned"][K - 2:K - 1]]
        assert mine <= min(others) + 1e-9
        inside = members.tolist()
        if 1 < K < n and (K <= 8 or K in reported(n)) and mine > losses["learned"][-1] + 1e-7 and n <= 64:
            swapped = [[*(set(inside) - {i}), j] for i in inside for j in everyone - set(inside)]
            assert mine <= best_subset(log_p, [inside, *swapped]) + 2e-8


@pytest.mark.parametrize("log_p", [real_scores(), *(log_probabilities(20, 200, seed) for seed in (6, 7))],
                         ids=["real", "made up, 6", "made up, 7"])
def test_the_learned_pair_is_the_best_of_all(log_p):
    members, w = answers_for(log_p)[0]["learned"][1]
    pairs = [list(pair) for pair in itertools.combinations(range(len(log_p)), 2)]
    assert loss(w, log_p[members]) == pytest.approx(best_subset(log_p, pairs), abs=1e-8)


def test_elimination_alone_ends_behind_and_is_mended():
    """The case that exchanges are for: a start that one of them lowers."""
    log_p = real_scores()
    p, weights = Probabilities(log_p), check(log_p)
    left = eliminate(p, weights.nonzero()[:, 0], weights[weights > 0])
    assert sorted(left) == list(range(1, max(left) + 1))
    mended = [exchange(p, *left[K]) for K in (2, 3, 4)]
    for (before, *_), (after, members, w) in zip([left[K] for K in (2, 3, 4)], mended):
        assert after <= before and after == pytest.approx(-(w @ p.exact(members)).log().mean().item(), abs=1e-12)
    assert any(after < left[K][0] - 1e-3 for K, (after, *_) in zip((2, 3, 4), mended))


def test_answers_follow_their_rules():
    log_p = log_probabilities(11, 800)
    losses, w = -log_p.double().mean(dim=1), check(log_p)
    rules, gap = answers_for(log_p)
    assert gap <= 1e-7 and [m.tolist() for m, _ in rules["best"]] == [[losses.argmin()]]
    support = int((w > 0).sum())
    assert 3 <= support < 11
    for K in range(1, 12):
        for rule in ("uniform", "topk", "learned"):
            members, weights = rules[rule][K - 1]
            assert len(set(members.tolist())) == len(weights) == K and abs(weights.sum().item() - 1) < 1e-12
        members, weights = rules["uniform"][K - 1]
        assert sorted(members.tolist()) == sorted(losses.argsort()[:K].tolist()) and np.allclose(weights, 1 / K)
        members, weights = rules["topk"][K - 1]
        assert all(w[members].min() >= w[i] for i in range(11) if i not in members)
        assert torch.allclose(weights, w[members] / w[members].sum())
        idle = [i for i in members.tolist() if w[i] == 0]
        assert idle == [i for i in losses.argsort().tolist() if w[i] == 0][:len(idle)]
        members, weights = rules["learned"][K - 1]
        idle = [i for i, weight in zip(members.tolist(), weights) if weight == 0]
        assert idle == [i for i in losses.argsort().tolist() if i not in members[weights > 0]][:len(idle)]
        if K >= support:
            members, weights = rules["learned"][K - 1]
            assert loss(weights, log_p[members]) == pytest.approx(loss(w, log_p), abs=1e-7)


def test_the_growing_mixture_uses_what_is_there():
    log_p, members = log_probabilities(6, 300), [(t, c) for t in range(2) for c in range(3)]
    for cycle, chosen, weights in growing(members, log_p):
        assert [members[i] for i in chosen] == [(t, c) for t, c in members if c <= cycle]
        assert torch.allclose(weights, check(log_p[chosen]))


def test_mixture_losses_against_the_plain_formula():
    log_p = log_probabilities(5, 20_000)                        # several blocks
    log_p[:, 7] = -200                                          # the public script's floor holds here
    r = np.random.default_rng(0)
    sizes, documents = r.integers(0, 4, 20_000).astype(np.uint8), np.sort(r.integers(0, 30, 20_000))
    mixtures = [answer for answers in answers_for(log_p)[0].values() for answer in answers]
    nats, bits = mixture_losses(mixtures, list(log_p.numpy()), sizes, documents)
    for (members, w), row, b in zip(mixtures, nats, bits):
        each = -(w @ log_p[members].double().exp()).clamp(min=1e-12).log()
        assert row.tolist() == pytest.approx([each[documents == d].sum().item() for d in range(30)], rel=1e-12)
        assert b == pytest.approx(each[torch.from_numpy(sizes > 0)].sum().item() / (math.log(2) * sizes.sum(dtype=int)),
                                  rel=1e-12)


def test_paired_error_is_the_bootstraps():
    r = np.random.default_rng(3)
    sizes = torch.from_numpy(r.integers(50, 400, 60)).double()
    difference = sizes * torch.from_numpy(r.normal(0.3, 0.05, 60))     # mostly the size of the document
    draws = r.integers(60, size=(4000, 60))
    means = difference[draws].sum(dim=1) / sizes[draws].sum(dim=1)
    assert paired_error(difference, sizes) == pytest.approx(means.std().item(), rel=0.06)
    assert paired_error(difference[:1], sizes[:1]) is None
    equal = torch.full((60,), 7.0, dtype=torch.float64)         # equal documents: the textbook's
    assert paired_error(difference, equal) == pytest.approx(difference.std().item() / 60 ** 0.5 / 7, rel=1e-9)
