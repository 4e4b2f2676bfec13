"""
How good are the answers for few members? For stored populations: the fitness and validation loss of backward
elimination alone (the rule before exchanges) and of prior.py's learned answer, with the number of single
exchanges (one member out, one in, fitted again) that lower it, all of them tried; up to 64 members for K <= 4
also the best of all subsets, with how often the answers are that subset:
python results/subsets.py NAME=RUN_DIR,RUN_DIR,... [NAME=...]
Prints a page. All choices are made on the fitness set. A number in place of RUN_DIR: so many made-up members
that are alike (tools/bench_prior.py), on 16,384 tokens of which the first half are the fitness set.
"""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from infra.files import read_tensors
from prior import EXACT, answers_for, interior, newton, probabilities
from tools.bench_prior import log_probabilities

SIZES, BEST = range(1, 17), "best of all subsets"


def scores(run_dir, split):
    """(members, tokens) float32."""
    if str(run_dir).isdigit():
        log_p = torch.stack([*log_probabilities(int(run_dir), 16_384)])
        return log_p.chunk(2, dim=1)[split == "val"]
    paths = sorted((Path(run_dir) / "scores" / split).glob("*.safetensors"))
    return torch.stack([read_tensors(path, f"{split} scores")[0]["log_p"] for path in paths])


def loss(log_p, members, w):
    return -(w @ log_p[members].double().exp()).log().mean().item()


def backward(log_p, weights):
    """
    {K: (members, weights)}: from the optimum, the member without whom the others' mixture, not fitted again,
    loses least goes, and the others are fitted again.
    """
    members = weights.nonzero()[:, 0]
    P, w = probabilities(log_p)[members], weights[members]
    found = {len(w): (members, w)}
    while len(w) > 1:
        mix = w @ P
        without = [((mix - w_i * row) / (1 - w_i)).clamp(min=1e-300).log().mean().item()
                   for w_i, row in zip(w, P)]
        keep = torch.arange(len(w)) != int(np.argmax(without))
        members, P = members[keep], P[keep]
        _, w = newton(P, w[keep] / w[keep].sum())
        found[len(w)] = members, w
    found[1] = log_p.double().mean(dim=1).argmax()[None], torch.ones(1, dtype=torch.float64)
    return found


def best_subset(log_p, K, limit):
    """
    (loss, members) of the best K members: expectation maximisation of all subsets at once, from equal
    weights; a subset goes once its lower bound, the loss less log(max_k mean(p_k / mix)), is above the best
    loss so far.
    """
    p = probabilities(log_p)
    P = p.float()                                                           # members, tokens
    subsets = torch.tensor(list(itertools.combinations(range(len(P)), K)))
    w = torch.full(subsets.shape, 1 / K)
    for step in range(400):
        bounds, losses, ratios = [], [], []
        for some, v in zip(subsets.split(512), w.split(512)):
            mix = torch.zeros(len(some), len(P)).scatter_(1, some, v) @ P
            s = ((1 / mix) @ P.T / P.size(1)).gather(1, some)
            losses.append(-mix.log().mean(dim=1))
            bounds.append(losses[-1] - s.max(dim=1).values.log())
            ratios.append(s)
        losses, bounds, ratios = torch.cat(losses), torch.cat(bounds), torch.cat(ratios)
        limit = min(limit, losses.min().item())
        keep = bounds < limit + 1e-7
        subsets, w = subsets[keep], (w * ratios)[keep]
        if len(subsets) < 20:
            break
    return min((newton(p[s], v.double() / v.sum().double())[0], s.tolist()) for s, v in zip(subsets, w))


def improving(p, members, w):
    """How many single exchanges lower the loss of these members."""
    P, start = p[members], interior(w)
    bound, found = newton(P, start)[0] - 1e-8, 0
    for i, new in itertools.product(range(len(w)), set(range(len(p))) - set(members.tolist())):
        P[i] = p[new]
        found += newton(P, start, bound)[0] < bound
        P[i] = p[members[i]]
    return found


def population(run_dir):
    """
    [(K, rule, fitness loss, validation loss, exchanges that lower it)] and {K: whether (old, new) are the
    best of all subsets}.
    """
    fit, val = scores(run_dir, "fit"), scores(run_dir, "val")
    rules, _ = answers_for(fit)
    old = backward(fit, rules_weights(rules, len(fit)))
    best = rules["best"][0]
    p = probabilities(fit)
    offset = loss(fit, *best) - newton(p[best[0]], best[1])[0]
    rows, optimal = [], {}
    for K in SIZES:
        answers = {"elimination": old[min(K, max(old))], "learned": rules["learned"][K - 1]}
        for rule, answer in answers.items():
            left = improving(p, *answer) if rule == "learned" else ""
            rows.append((K, rule, loss(fit, *answer), loss(val, *answer), left))
        if K <= 4 and len(fit) <= EXACT:
            best, members = best_subset(fit, K, loss(fit, *answers["learned"]) - offset)
            optimal[K] = [sorted(m.tolist()) == sorted(members) for m, _ in answers.values()]
            rows.append((K, BEST, best + offset, math.nan, ""))
    return rows, optimal


def rules_weights(rules, members):
    """The weights of the one fit, from the answer for all members."""
    order, w = rules["topk"][-1]
    return torch.zeros(members, dtype=torch.float64).index_copy(0, order, w)


def numbers(values):
    return "" if np.isnan(values).any() else ", ".join(f"{x:.4f}" for x in values)


def main():
    print("| text | K | rule | fitness loss | validation loss | exchanges that lower it | is the best subset "
          "| missed by |\n" + "|---" * 8 + "|")
    for name, run_dirs in (argument.split("=", 1) for argument in sys.argv[1:]):
        found = [population(run_dir) for run_dir in run_dirs.split(",")]
        for K, rule in dict.fromkeys((K, rule) for K, rule, *_ in found[0][0]):
            def column(i, rule):
                return [next(row[i] for row in rows if row[:2] == (K, rule)) for rows, _ in found]
            fit, left, hits, missed = np.array(column(2, rule)), column(4, rule), "", ""
            if all(K in optimal for _, optimal in found) and rule != BEST:
                hits = sum(optimal[K][rule == "learned"] for _, optimal in found)
                hits = f"{hits} of {len(found)}"
                missed = numbers(np.maximum(0, fit - column(2, BEST)))
            left = ", ".join(map(str, left)) if rule == "learned" else ""
            cells = name, K, rule, numbers(fit), numbers(column(3, rule)), left, hits, missed
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
