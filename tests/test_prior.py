"""The prior: fits against the proof that they are optimal, choices of K members against brute force."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prior import answers_for, fit_weights, growing, mixture_losses


def log_probabilities(members, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, generator=g) * 1.5 - 3
    handicap = torch.linspace(0, 0.25, members)[torch.randperm(members, generator=g)]
    return (base + 0.6 * torch.randn(members, tokens, generator=g) - handicap[:, None]).clamp(max=-1e-3)


def knowing(members, tokens, low, high=-0.01):
    """Each member knows every n-th token, and gives the others' a log-probability of low."""
    return torch.where(torch.arange(tokens) % members == torch.arange(members)[:, None], high, low)


def with_holes(low):
    """A few log-probabilities are low, one of them where the fit starts: at the best member's."""
    log_p = log_probabilities(6, 1000)
    log_p[torch.rand(6, 1000, generator=torch.Generator().manual_seed(1)) < 0.002] = low
    log_p[log_p.clamp(min=-700).mean(dim=1).argmax(), 17] = low
    return log_p


def with_poor_one(worse, seed):
    """The last member is the worst, but alone expects a token: a small weight, a large curvature."""
    g = torch.Generator().manual_seed(seed)
    log_p = log_probabilities(1, 3000, seed) + 0.3 * torch.randn(3, 3000, generator=g)
    log_p[-1] -= 1
    log_p[:-1, 7] -= worse
    return log_p


def far_apart(seed):
    """Over forty orders of magnitude, each member two or three times: singular, and ill-conditioned."""
    log_p = 12 * torch.randn(12, 60 + 20 * seed, generator=torch.Generator().manual_seed(seed)) - 10
    return log_p.clamp(-41, -1e-4).repeat(2 + seed % 2, 1)


def with_zeros():
    log_p = log_probabilities(5, 300)
    log_p[2, 7], log_p[:, 11], log_p[0] = -math.inf, -math.inf, -2000.0         # token 11: nobody expects it
    return log_p


def check(log_p):
    """
    A fit's weights, after the proof: the problem is convex, and by the gap, computed anew from logarithms,
    no weights are better by more than 1e-7 nats (paper, eq. 8).
    """
    before, (w, gap) = log_p.clone(), fit_weights(log_p)
    assert torch.equal(log_p, before) and w.dtype == torch.float64
    assert abs(w.sum().item() - 1) < 1e-12 and (w >= 0).all() and gap <= 1e-7
    exact = log_p.double().clamp(min=-700)
    mix = (w.log()[:, None] + exact).logsumexp(0)
    assert (exact - mix).exp().mean(dim=1).max().item() - 1 == pytest.approx(gap, abs=1e-9)
    return w


@pytest.mark.parametrize("populations", [
    [log_probabilities(*shape) for shape in ((1, 30), (2, 50, 1), (3, 200), (40, 3000, 3), (64, 40, 4))],
    [log_probabilities(1, 100).repeat(4, 1), with_zeros(), knowing(10, 300, -math.inf),
     knowing(100, 1000, -math.inf)],
    [make(low) for low in (-60.0, -110.0, -250.0, -700.0, -math.inf)
     for make in (with_holes, lambda low: knowing(6, 120, low))],
    [with_poor_one(worse, seed) for worse in (8.0, 10.0, 46.0, math.inf) for seed in range(12)],
    [far_apart(seed) for seed in range(12)],
], ids=["made up", "equal, without a common token", "with holes", "one poor member", "far apart, copied"])
def test_the_fit_is_optimal(populations):
    for log_p in populations:
        check(log_p)


# ------------------------------------------------------------------------------------ which K members

def loss(answer, log_p):
    members, w = answer
    return -(w @ log_p[members].double().exp()).log().mean().item()


def best_subset(log_p, subsets):
    """The lowest loss of the fits on these subsets."""
    return min(loss((s, fit_weights(log_p[s])[0]), log_p) for s in subsets)


def real_scores():
    """
    Of the 32 members of configs/tiny.py (seed 42), every 32nd token of the fitness set: (32, 508) float32.
    """
    return torch.from_numpy(np.load(Path(__file__).with_name("data") / "fitness_scores.npy")).float()


def specialised():
    g = torch.Generator().manual_seed(0)
    return knowing(20, 300, -8.0, -0.1) - 0.1 * torch.rand(20, 300, generator=g)


@pytest.mark.parametrize("log_p", [
    real_scores(), log_probabilities(12, 300, 3), log_probabilities(20, 200, 6),
    log_probabilities(70, 200, 4), specialised()],
    ids=["real", "12 made up", "20 made up", "70 made up", "specialised"])
def test_learned_is_never_behind(log_p):
    """
    At every K not behind a smaller K or another rule; of at most 64 members the pair is the best of all, and
    where exchanges are tried none is left that lowers the loss.
    """
    rules, _ = answers_for(log_p)
    losses = {rule: [loss(answer, log_p) for answer in answers] for rule, answers in rules.items()}
    n = len(log_p)
    for K, ((members, _), mine) in enumerate(zip(rules["learned"], losses["learned"]), 1):
        others = [losses[rule][K - 1] for rule in ("uniform", "topk")] + losses["learned"][:K - 1]
        assert mine <= min(others) + 1e-9
        inside, outside = set(members.tolist()), set(range(n)) - set(members.tolist())
        subsets = [[*(inside - {i}), j] for i in inside for j in outside]
        if K == 2:
            subsets = list(map(list, itertools.combinations(range(n), 2)))
        if K in (2, 3, 8, 16) and K < n <= 64 and mine > losses["learned"][-1] + 1e-7:
            assert mine <= best_subset(log_p, [members.tolist(), *subsets]) + 2e-8


def test_answers_follow_their_rules():
    log_p = log_probabilities(11, 800, 4)
    losses, w = -log_p.double().mean(dim=1), check(log_p)
    by_loss, support = losses.argsort().tolist(), int((w > 0).sum())
    rules, gap = answers_for(log_p)
    assert gap <= 1e-7 and [m.tolist() for m, _ in rules["best"]] == [by_loss[:1]] and 3 <= support < 11
    for K in range(1, 12):
        for rule in ("uniform", "topk", "learned"):
            members, weights = rules[rule][K - 1]
            assert len(set(members.tolist())) == len(weights) == K and abs(weights.sum().item() - 1) < 1e-12
            if rule != "uniform":                               # of those without weight the best stand there
                idle = [i for i, v in zip(members.tolist(), weights) if v == 0]
                assert idle == [i for i in by_loss if i not in members[weights > 0]][:len(idle)]
        members, weights = rules["uniform"][K - 1]
        assert sorted(members.tolist()) == sorted(by_loss[:K]) and np.allclose(weights, 1 / K)
        members, weights = rules["topk"][K - 1]
        assert all(w[members].min() >= w[i] for i in range(11) if i not in members)
        assert torch.allclose(weights, w[members] / w[members].sum())
        if K >= support:
            assert loss(rules["learned"][K - 1], log_p) == pytest.approx(
                loss((range(11), w), log_p), abs=1e-7)
    for answers in answers_for(log_p[:1])[0].values():          # one member is a population
        assert [(m.tolist(), w.tolist()) for m, w in answers] == [([0], [1.0])]


def test_the_growing_mixture_uses_what_is_there():
    log_p, members = log_probabilities(6, 300), [(t, c) for t in range(2) for c in range(3)]
    for cycle, chosen, weights in growing(members, log_p):
        assert [members[i] for i in chosen] == [(t, c) for t, c in members if c <= cycle]
        assert torch.allclose(weights, check(log_p[chosen]))


@pytest.mark.parametrize("seed", range(4))
def test_near_copies_that_differ_by_a_constant(seed):
    """Float32 sums would hide by how much, and Newton's steps lead nowhere."""
    g = torch.Generator().manual_seed(seed)
    log_p = -3 * torch.rand(20_000, generator=g) - 0.1 - 1e-3 * torch.rand(4, 1, generator=g)
    log_p = log_p + 1e-4 * torch.randn(4, 20_000, generator=g)
    for _, chosen, weights in growing([(0, 0), (1, 1), (2, 1), (3, 1)], log_p):
        assert torch.allclose(weights, check(log_p[chosen]), atol=1e-4)


def test_mixture_losses_against_the_plain_formula():
    """Over several blocks. tests/test_scripts.py holds all of prior.json, the errors too, to its formulas."""
    log_p, r = log_probabilities(5, 20_000), np.random.default_rng(0)
    log_p[:, 7] = -200                                          # the public script's floor holds here
    sizes, documents = r.integers(0, 4, 20_000).astype(np.uint8), np.sort(r.integers(0, 30, 20_000))
    mixtures = answers_for(log_p)[0]["uniform"]
    nats, bits = mixture_losses(mixtures, list(log_p.numpy()), sizes, documents)
    for (members, w), row, b in zip(mixtures, nats, bits):
        each = -(w @ log_p[members].double().exp()).clamp(min=1e-12).log()
        assert row.tolist() == pytest.approx([each[documents == d].sum().item() for d in range(30)])
        of_text = each[torch.from_numpy(sizes > 0)].sum().item()
        assert b == pytest.approx(of_text / (math.log(2) * sizes.sum(dtype=int)))
