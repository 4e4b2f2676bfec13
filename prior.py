"""
Primitive 3, the learned prior (paper, section 3.3): weights over members that minimise the loss of their mixture, the
weighted mean of probabilities, on held-out text (the fitness set), for every inference budget K = members that answer.

One process:  python prior.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 prior.py configs/1p8b.py

Scores every member once (run_dir/scores), fits, and writes run_dir/prior.json: members and their losses; for each K and
rule the members, weights and losses. All choices are made on the fitness set; validation text only reports.
"""
import math

import numpy as np
import torch

from config import from_args, refuse
from data import loader
from model import GPT
from population import Run, join_world, next_command, write_json

BLOCK = 1 << 13         # tokens of all members held in float64 at once


# --------------------------------------------------------------------------------------------- the fit

def nonnegative_qp(H, b, y):
    """argmin of y'Hy/2 - b'y over y >= 0, from a feasible y: the active-set method of Lawson and Hanson (1974)."""
    free = y > 0
    for _ in range(20 * len(b)):
        z = torch.zeros_like(b)
        z[free] = torch.linalg.solve(H[free][:, free], b[free])
        blocked = free & (z <= 0)
        if blocked.any():                   # go as far as the first bound, which becomes active
            reach = torch.where(blocked, y / (y - z), torch.inf)
            free = free & (reach > reach.min())
            y = torch.where(free, y + reach.min() * (z - y), 0)
            continue
        y, gain = z, torch.where(free, -torch.inf, b - H @ z)
        if gain.max() < 1e-12:
            break
        free[gain.argmax()] = True
    return y


def fit_on(P, w):
    """argmin of -mean log(w @ P) over the simplex, from w, for few members: P is (k, tokens) float64."""
    loss = lambda w: w.sum() - (w @ P).log().mean()         # its minimum over w >= 0 sums to 1 by itself
    for _ in range(100):
        R = P / (w @ P)
        s, H = R.mean(dim=1), R @ R.T / R.size(1)           # gradient 1 - s, Hessian H, and H w = s:
        y = nonnegative_qp(H + 1e-12 * torch.eye(len(w), dtype=H.dtype), 2 * s - 1, w)      # Newton's model
        slope, t = (1 - s) @ (y - w), 1.0
        if s.max() - 1 < 1e-10 or slope > -1e-16:
            break
        while loss(w + t * (y - w)) > loss(w) + 1e-4 * t * slope and t > 1e-8:
            t /= 2
        w = w + t * (y - w)
        w = w / w.sum()
    return w


def fit_weights(log_p, tolerance=1e-7):
    """
    The weights w (members,) float64 on the simplex that minimise -mean_t log(sum_i w_i p_i,t), and the proven bound on
    their distance from the optimum in nats: gap = max_i mean_t(p_i,t / mix_t) - 1 <= tolerance (paper, eq. 8; the
    problem is convex). log_p: (members, tokens) float32 log-probabilities of the targets, read only.
    """
    members, tokens = log_p.shape
    read = lambda z: z.double().clamp(min=-700)                 # a probability of 0 is merely very small
    top = read(log_p.max(dim=0).values)                         # a factor per token changes nothing but the range
    blocks = [slice(i, i + BLOCK) for i in range(0, tokens, BLOCK)]
    w = torch.zeros(members, dtype=torch.float64)
    w[log_p.clamp(min=-700).mean(dim=1, dtype=torch.float64).argmax()] = 1
    for _ in range(1000):
        support = w > 0
        mix = w[support] @ (read(log_p[support]) - top).exp()
        s = sum((read(log_p[:, b]) - top[b]).exp() @ (1 / mix[b]) for b in blocks) / tokens
        gap = s.max().item() - 1
        if gap <= tolerance:
            return w, gap
        better = s.topk(min(32, members)).indices               # members whose share would lower the loss join
        support[better[s[better] > 1]] = True
        w[support] = fit_on((read(log_p[support]) - top).exp(), w[support])
    raise RuntimeError(f"the fit stopped at a gap of {gap}, above {tolerance}")


def answers_for(log_p):
    """
    [(rule, members, weights)] for K = 1, 2, 4, ... and all. best: the lowest fitness loss; uniform: the K lowest, equal
    weights; topk: the K largest weights of the one fit, renormalised (the paper's); learned: the same K, fitted again.
    """
    count = len(log_p)
    losses = -log_p.mean(dim=1, dtype=torch.float64)
    weights, gap = fit_weights(log_p)
    by_loss = losses.argsort(stable=True)
    by_weight = by_loss[weights[by_loss].argsort(descending=True, stable=True)]     # without weight: by loss
    answers = [("best", by_loss[:1], torch.ones(1, dtype=torch.float64))]
    for K in sorted({2 ** i for i in range(count.bit_length())} | {count}):
        chosen = by_weight[:K]
        answers += [("uniform", by_loss[:K], torch.full((K,), 1 / K, dtype=torch.float64)),
                    ("topk", chosen, weights[chosen] / weights[chosen].sum()),
                    ("learned", chosen, fit_weights(log_p[chosen])[0])]
    return answers, gap


# -------------------------------------------------------------------------------------------- the losses

def mixture_losses(answers, log_p, token_bytes):
    """
    [(loss in nats per token, bits per byte)] of each answer's mixture. log_p: a list of (tokens,) arrays, one a member;
    token_bytes (tokens,): bytes of each target; the separator has none and is left out of the bits.
    """
    W = torch.zeros(len(answers), len(log_p), dtype=torch.float64)
    for row, (_, members, weights) in zip(W, answers):
        row[members] = weights
    nats, text_nats = torch.zeros(2, len(answers), dtype=torch.float64)
    for i in range(0, len(token_bytes), BLOCK):
        p = torch.from_numpy(np.stack([member[i:i + BLOCK] for member in log_p])).double().exp()
        loss = -(W @ p).clamp(min=1e-12).log()                              # answers, block
        nats += loss.sum(dim=1)
        text_nats += loss[:, torch.from_numpy(token_bytes[i:i + BLOCK] > 0)].sum(dim=1)
    bits = text_nats / (math.log(2) * max(1, int(token_bytes.sum(dtype=np.int64))))
    return list(zip((nats / len(token_bytes)).tolist(), bits.tolist()))


# --------------------------------------------------------------------------------------------- the scores

def score_members(config, data, run, world, members):
    """Each rank scores every size-th member that has no scores yet, on both held-out sets."""
    mine = members[world.rank::world.size]
    todo = [(t, c) for t, c in mine if not run.scored(t, c, run.read_member(t, c)[1])]
    model = GPT(config).place(world.device, config.compile) if todo else None
    for t, c in world.progress(todo, unit="member", desc="scoring"):
        weights, about = run.read_member(t, c)
        model.load_state_dict(weights)
        scores = {split: loader.score(model, getattr(data, split), config.micro_batch) for split in ("fit", "val")}
        if not all(np.isfinite(s).all() for s in scores.values()):
            refuse(f"{run.member_path(t, c)} gives probabilities that are no numbers: delete its trajectory and train it again")
        run.save_scores(t, c, about, scores)


def report(config, members, answers, gap, text):
    """prior.json's content, and its table on standard output."""
    print(f"{'K':>4} {'rule':8} {'fitness':>8} {'validation':>10} {'perplexity':>10} {'bits/byte':>9}")
    for a in answers:
        print(f"{a['K']:>4} {a['rule']:8} {a['fit_loss']:>8.4f} {a['val_loss']:>10.4f} {a['val_perplexity']:>10.3f} {a['val_bits_per_byte']:>9.4f}")
    total = config.trajectories * config.cycles
    print(f"{len(members)} of {total} members; losses in nats per token; optimality gap of the fit {gap:.1e} nats")
    return dict(text=text, epochs=len(members) * config.epochs_per_cycle, gap=gap, members=members, answers=answers)


def main(argv=None):
    config = from_args(argv, __doc__)
    data = loader.load(config)
    run = Run(config, data.fingerprint)
    members = run.members()
    if not members:
        refuse(f"run_dir={run.path} has no members: run train.py and distill.py on this config first")
    world = join_world(config)
    score_members(config, data, run, world, members)
    world.barrier(everyone=True)
    world.close()
    if world.rank > 0:
        return
    log_p = {split: [run.read_scores(split, t, c) for t, c in members] for split in ("fit", "val")}
    answers, gap = answers_for(torch.from_numpy(np.stack(log_p["fit"])))
    singles = [("member", torch.tensor([i]), torch.ones(1, dtype=torch.float64)) for i in range(len(members))]
    token_bytes = {split: data.token_bytes[getattr(data, split)[:, 1:]].ravel() for split in log_p}
    fit, val = (mixture_losses(singles + answers, log_p[split], token_bytes[split]) for split in ("fit", "val"))
    rows = [dict(fit_loss=f[0], val_loss=v[0], val_perplexity=math.exp(v[0]), val_bits_per_byte=v[1]) for f, v in zip(fit, val)]
    about = [dict(trajectory=t, cycle=c, **row) for (t, c), row in zip(members, rows)]
    answers = [dict(K=len(chosen), rule=rule, members=chosen.tolist(), weights=weights.tolist(), **row)
               for (rule, chosen, weights), row in zip(answers, rows[len(members):])]
    write_json(run.path / "prior.json", report(config, about, answers, gap, loader.text_source(config)))
    for row in about:
        run.log(kind="score", **row)
    print(f"wrote {run.path / 'prior.json'}; {next_command('-m tools.plot', argv)}")


if __name__ == "__main__":
    main()
