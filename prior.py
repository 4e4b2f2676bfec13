"""
Primitive 3, the learned prior (paper, section 3.3): weights over members that minimise the loss of their
mixture, the weighted mean of probabilities, on held-out text (the fitness set), for every inference budget K
= members that answer.

One process:  python prior.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 prior.py configs/1p8b.py
A student:    the same and --student: of run_dir/student, a population of one
 Scores every member on the held-out sets that it has no scores for yet, fits, and writes run_dir/prior.json:
members and their losses; for each rule the losses for every K, and for K = 1, 2, 4, ... and all the members
and weights; the loss after each cycle. All choices are made on the fitness set; validation text only reports.
"""
import dataclasses
import math
import sys
import textwrap

import numpy as np
import torch

from data import loader
from infra.config import from_args, student_of
from infra.console import fail, next_command, print0, progress_bar, script
from infra.distributed import cores, join
from infra.files import write_json
from infra.run_directory import SPLITS, RunDirectory
from model import GPT

BLOCK = 1 << 13         # tokens of all members held in float64 at once


# --------------------------------------------------------------------------------------------- the fit

def nonnegative_qp(H, b, y):
    """argmin of y'Hy/2 - b'y over y >= 0, from a feasible y: the active sets of Lawson and Hanson (1974)."""
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
    def loss(w):
        return w.sum() - (w @ P).log().mean()       # its minimum over w >= 0 sums to 1 by itself
    for _ in range(100):
        R = P / (w @ P)
        s, H = R.mean(dim=1), R @ R.T / R.size(1)           # gradient 1 - s, Hessian H
        # Newton's model (1-s)'(y-w) + (y-w)'H(y-w)/2 is, since Hw = s, y'Hy/2 - (2s-1)'y and a constant
        y = nonnegative_qp(H + 1e-11 * H.diagonal().diag(), 2 * s - 1, w)      # ridge: equal members share
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
    The weights w (members,) float64 on the simplex that minimise -mean_t log(sum_i w_i p_i,t), and the proven
    bound on their distance from the optimum in nats: gap = max_i mean_t(p_i,t / mix_t) - 1 <= tolerance
    (paper, eq. 8; the problem is convex); RuntimeError where it stays above. log_p: (members, tokens) float32
    log-probabilities of the targets, read only; of the members that get no weight at most a block of tokens
    is copied.
    """
    members, tokens = log_p.shape
    blocks = [slice(i, i + BLOCK) for i in range(0, tokens, BLOCK)]
    largest = to_float64(log_p.max(dim=0).values)               # a factor per token changes the range alone
    w = torch.zeros(members, dtype=torch.float64)
    w[mean_log_p(log_p).argmax()] = 1
    for _ in range(1000):
        support = w > 0
        mix = w[support] @ relative(log_p[support], largest)
        s = sum(relative(log_p[:, b], largest[b]) @ (1 / mix[b]) for b in blocks) / tokens
        gap = s.max().item() - 1
        if gap <= tolerance:
            return w, gap
        better = s.topk(min(32, members)).indices               # those whose share would lower the loss join,
        better = better[(s[better] > 1) & (w[better] == 0)]
        w[better] = 0.01                                        # with a share: Newton starts inside
        support = w > 0
        w[support] = fit_on(relative(log_p[support], largest), w[support] / w.sum())
    raise RuntimeError(f"the fit stopped at a gap of {gap}, above {tolerance}")


def to_float64(log_p):
    """In float64, a probability of 0 as a very small one."""
    return log_p.double().clamp(min=-700)


def relative(log_p, largest):
    """Probabilities over the largest that any member gives; below e^-45 of it they add nothing."""
    return to_float64(log_p).sub_(largest).clamp_(min=-45).exp_()         # in place, on the copy


def mean_log_p(log_p):
    """Of every member, (members,) float64."""
    return torch.stack([to_float64(row).mean() for row in log_p])


# ------------------------------------------------------------------------------------ which K members

def eliminate(log_p, weights):
    """
    {K: (members, weights)} for K = 1 .. as many as have weight: from the optimum over all, the member without
    whom the others' mixture loses least goes, the others are fitted again, and so on (greedy: good, not
    proven best); for K = 1 the best member, exactly.
    """
    members = weights.nonzero()[:, 0]
    P = relative(log_p[members], to_float64(log_p.max(dim=0).values))
    w, found = weights[members], {}
    while len(members) > 1:
        found[len(members)] = members, w
        mix, rest = w @ P, (1 - w).clamp(min=1e-300)
        without = torch.stack([((mix - w_i * p) / r).clamp(min=1e-300).log().mean()
                               for w_i, p, r in zip(w, P, rest)])
        keep = torch.arange(len(w)) != without.argmax()
        members, P, w = members[keep], P[keep], w[keep] / w[keep].sum()
        w = fit_on(P, w)
    found[1] = mean_log_p(log_p).argmax()[None], torch.ones(1, dtype=torch.float64)
    return found


def answers_for(log_p):
    """
    {rule: [(K members, weights) for K = 1 .. all]} and the gap of the fit. best: the member of lowest fitness
    loss; uniform: the K lowest, equal weights; topk: the K largest weights of the one fit, renormalised (the
    paper's); learned: what elimination leaves, and where that is fewer than K others, by loss, with weight 0.
    """
    weights, gap = fit_weights(log_p)
    by_loss = mean_log_p(log_p).argsort(descending=True, stable=True)
    by_weight = by_loss[weights[by_loss].argsort(descending=True, stable=True)]
    left = eliminate(log_p, weights)
    rules = {"best": [(by_loss[:1], weights.new_ones(1))], "uniform": [], "topk": [], "learned": []}
    for K in range(1, len(log_p) + 1):
        rules["uniform"].append((by_loss[:K], weights.new_full((K,), 1 / K)))
        rules["topk"].append((by_weight[:K], weights[by_weight[:K]] / weights[by_weight[:K]].sum()))
        members, w = left[min(K, max(left))]
        idle = by_loss[~torch.isin(by_loss, members)][:K - len(members)]
        rules["learned"].append((torch.cat([members, idle]), torch.cat([w, w.new_zeros(len(idle))])))
    return rules, gap


def growing(members, log_p):
    """[(cycle, members, weights)]: the learned prior over the members up to each cycle."""
    grown = []
    for cycle in sorted({c for _, c in members}):
        there = torch.tensor([i for i, (_, c) in enumerate(members) if c <= cycle])
        grown.append((cycle, there, fit_weights(log_p[there])[0]))
    return grown


# -------------------------------------------------------------------------------------------- the losses

def mixture_losses(mixtures, log_p, token_bytes, documents):
    """
    Of each mixture (members, weights): the nats in every document (mixtures, documents) and bits per byte
    (mixtures,). log_p: a list of (tokens,) arrays, one a member; token_bytes (tokens,): bytes of each target,
    0 for the separator, which is left out of the bits; documents (tokens,): the document of each target, from
    0.
    """
    W = torch.zeros(len(mixtures), len(log_p), dtype=torch.float64)
    for row, (members, weights) in zip(W, mixtures):
        row[members] = weights
    nats, text_nats = W.new_zeros(len(W), int(documents.max()) + 1), W.new_zeros(len(W))
    for i in range(0, len(token_bytes), BLOCK):
        p = torch.from_numpy(np.stack([member[i:i + BLOCK] for member in log_p])).double().exp()
        loss = -(W @ p).clamp(min=1e-12).log()          # mixtures, block; the script's floor
        nats.index_add_(1, torch.from_numpy(documents[i:i + BLOCK]), loss)
        text_nats += loss[:, torch.from_numpy(token_bytes[i:i + BLOCK] > 0)].sum(dim=1)
    return nats, text_nats / (math.log(2) * max(1, int(token_bytes.sum(dtype=np.int64))))


def paired_error(difference, sizes):
    """
    Standard error of the mean difference per token, over documents: (documents,) nats and (documents,)
    tokens. None for a single document, which says nothing of another.
    """
    if len(sizes) < 2:
        return None
    residual = difference - difference.sum() / sizes.sum() * sizes          # of a ratio of sums
    return (residual.square().sum() * len(sizes) / (len(sizes) - 1)).sqrt().item() / sizes.sum().item()


# --------------------------------------------------------------------------------------------- the scores

def model_to_score(config):
    """A GPT without the MTP head, which is for training alone."""
    return GPT(dataclasses.replace(config, mtp_weight=0.0))


def load_weights(model, path, weights):
    """Load weights, without the MTP head. Exits with code 2 where they do not fit."""
    try:
        model.load_state_dict({name: w for name, w in weights.items() if not name.startswith("mtp_")})
    except RuntimeError as e:
        first = textwrap.shorten(str(e).splitlines()[1].strip(" ."), 200)
        fail(f"'{path}' is of another model or tokenizer: {first}; use its config")


def load_member(model, run, t, c):
    """A member's weights into a model_to_score; returns their SHA-256."""
    weights, about = run.load_member(t, c)
    load_weights(model, run.member_path(t, c), weights)
    return about["tensors_sha256"]


def score_members(config, data, run, ranks):
    """Score every member where it has no scores yet, spread over the ranks. (trajectory, cycle) of all."""
    members = ranks.of_first(run.members())         # training may add some meanwhile
    def unscored(member):
        own = run.load_member(*member, check=False)[1]["tensors_sha256"]
        return [split for split in SPLITS if run.load_scores(split, *member, check=False)[1] != own]
    todo = [member for member in members[ranks.rank::ranks.world_size] if unscored(member)]
    model = model_to_score(config).to_device(ranks.device, config.compile) if todo else None
    for t, c in progress_bar(todo, unit="member", desc="scoring", disable=ranks.rank > 0 or not todo):
        sha256, losses = load_member(model, run, t, c), {}
        for split in unscored((t, c)):
            log_p = loader.score(model, getattr(data, split), config.micro_batch)
            run.save_scores(split, t, c, log_p, sha256)
            losses[f"{split}_loss"] = -float(log_p.mean())
        run.log(kind="score", trajectory=t, cycle=c, **losses)
    ranks.barrier(everyone=True)
    return members


# ---------------------------------------------------------------------------------------------- the report

def evaluate(mixtures, best, log_p, data):
    """
    What is reported of each of these mixtures, [(members, weights)], in one pass over each held-out set:
    losses, perplexity, bits per byte, and the standard error of the difference to mixture number `best` over
    validation documents. log_p: split -> a list of (tokens,), one a member.
    """
    nats, bits = {}, {}
    for split in SPLITS:
        targets = getattr(data, split)[:, 1:].ravel()
        documents = data.val_documents if split == "val" else np.zeros(targets.size, np.int64)
        sizes = data.token_bytes[targets]
        nats[split], bits[split] = mixture_losses(mixtures, log_p[split], sizes, documents)
    fit, val = ((nats[split].sum(dim=1) / len(log_p[split][0])).tolist() for split in SPLITS)
    lengths = torch.from_numpy(np.bincount(data.val_documents)).double()
    return [dict(fit_loss=fit[i], val_loss=val[i], val_perplexity=math.exp(val[i]),
                 val_bits_per_byte=bits["val"][i].item(),
                 val_error=paired_error(nats["val"][i] - nats["val"][best], lengths))
            for i in range(len(mixtures))]


def print_table(config, result):
    print0("   K rule      fitness validation     +- perplexity bits/byte")
    for a in result["answers"]:
        error = "-" if a["val_error"] is None else f"{a['val_error']:.4f}"
        print0(f"{a['K']:>4} {a['rule']:8} {a['fit_loss']:>8.4f} {a['val_loss']:>10.4f} {error:>6} "
               f"{a['val_perplexity']:>10.3f} {a['val_bits_per_byte']:>9.4f}")
    print0(f"{len(result['members'])} of {config.trajectories * config.cycles} members. Losses in nats per "
           "token, +- is the standard error, over validation documents, of the difference to the best "
           f"member. The fit is within {max(result['gap'], 0):.1e} nats of its optimum.")


def build_report(config, data, run, members):
    """The contents of prior.json, from the scores of the members."""
    scores = {split: [run.load_scores(split, *member) for member in members] for split in SPLITS}
    log_p = {split: [log_p for log_p, _ in of] for split, of in scores.items()}
    fit = torch.from_numpy(np.stack(log_p["fit"]))                                  # members, tokens
    rules, gap = answers_for(fit)
    grown = growing(members, fit)
    alone = [(torch.tensor([i]), torch.ones(1, dtype=torch.float64)) for i in range(len(members))]
    mixtures = [("members", m) for m in alone] + [("growing", tuple(m)) for _, *m in grown]
    mixtures += [(rule, answer) for rule, answers in rules.items() for answer in answers]
    losses = {kind: [] for kind, _ in mixtures}
    best = int(mean_log_p(fit).argmax())        # its place among the mixtures, too
    for (kind, _), row in zip(mixtures, evaluate([mixture for _, mixture in mixtures], best, log_p, data)):
        losses[kind].append(row)
    result = dict(text=loader.read_about(config), distill_from=config.distill_from, gap=gap)
    result |= dict(answers=[], losses={})
    result["members"] = [dict(trajectory=t, cycle=c, weights_sha256=sha256, **row)
                         for (t, c), (_, sha256), row in zip(members, scores["fit"], losses["members"])]
    result["growing"] = [dict(cycle=cycle, members=len(chosen),
                              epochs=sum(config.cycle_epochs(members[i][1]) for i in chosen), **row)
                         for (cycle, chosen, _), row in zip(grown, losses["growing"])]
    kept = {len(members), *(2 ** i for i in range(len(members).bit_length()))}
    for rule, answers in rules.items():
        answers = [dict(K=len(m), rule=rule, members=m.tolist(), weights=w.tolist(), **row)
                   for (m, w), row in zip(answers, losses[rule])]
        result["answers"] += [a for a in answers if a["K"] in kept]
        result["losses"][rule] = {split: [a[f"{split}_loss"] for a in answers] for split in log_p}
    result["answers"].sort(key=lambda a: a["K"])
    return result


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, student=False)
    if options.student:
        config = student_of(config)
    data = loader.load(config)
    run = RunDirectory(config, data.fingerprint)
    if not run.members():
        fail(f"run_dir='{run.path}' has no members: run train.py and "
             f"distill.py{' --student' if options.student else ''} on this config first")
    ranks = join(config)
    with run.open(ranks, "scores"):            # training may go on beside this
        members = score_members(config, data, run, ranks)
        ranks.leave()
        if ranks.rank > 0:
            return
        if ranks.world_size > 1:              # torchrun's one thread a rank: the others are done
            torch.set_num_threads(cores())
        result = build_report(config, data, run, members)
        write_json(run.path / "prior.json", result)
    print_table(config, result)
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--student"]   # the picture has both
    print0(f"wrote {run.path / 'prior.json'}; next: {next_command('-m tools.plot', argv)}")


if __name__ == "__main__":
    main()
