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
import functools
import math
import operator
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

def to_float64(log_p):
    """In float64, a probability of 0 as a very small one."""
    return log_p.double().clamp(min=-700)


def mean_log_p(log_p):
    """Of every member, (members,) float64."""
    return torch.stack([to_float64(row).mean() for row in log_p])


class Probabilities:
    """
    Those of log_p (members, tokens), which is only read, over the largest that any member gives to the token:
    a factor that changes no comparison of mixtures. What is below e^-40 of it counts as e^-40, so that
    float32 holds the squares.
    """

    def __init__(self, log_p):
        self.log_p, self.largest = log_p, to_float64(log_p.max(dim=0).values)
        self.fast = torch.stack([self.exact(i).float() for i in range(len(log_p))])    # to search by

    def exact(self, members):
        """Of these members, in float64."""
        return to_float64(self.log_p[members]).sub_(self.largest).clamp_(min=-40).exp_()    # on the copy

    def ratios(self, mix):
        """mean_t(p_i,t / mix_t) of every member i: above 1 where a share of it would lower the loss."""
        return (self.fast @ (1 / mix).float()).double() / len(mix)


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


def newton(P, w, tolerance=1e-10):
    """
    argmin of -mean log(w @ P), the loss up to P's scale, over the simplex, from w (k,) float64, for few
    members: (loss, w, Hessian). P: (k, tokens) float64; or float32, for a tolerance of 1e-5.
    """
    def loss(w):
        # with the constraint that w sums to 1, whose multiplier is 1, folded in: the gradient is 1 - s
        return w.sum() - (w.to(P.dtype) @ P).log().mean().double()
    now, rounding = loss(w), 4 * torch.finfo(P.dtype).eps
    for _ in range(100):
        inverse = 1 / (w.to(P.dtype) @ P)
        s = (P @ inverse).double() / len(inverse)
        R = P.float() * (inverse / len(inverse) ** 0.5).float()
        H = (R @ R.T).double()                  # rounding here costs steps, not precision
        H += 1e-6 * H.diagonal().diag()         # equal members share
        y = nonnegative_qp(H, H @ w + s - 1, w)
        slope, t = (1 - s) @ (y - w), 1.0
        if s.max() - 1 < tolerance or slope > -tolerance ** 2.2:        # a gain that no digit would show
            break
        while (then := loss(w + t * (y - w))) > now + 1e-4 * t * slope + rounding and t > 1e-8:
            t /= 2
        w, now = w + t * (y - w), then
        w = w / w.sum()
    return loss(w).item() - 1, w, H


def fit(p, w=None, among=None, tolerance=1e-7):
    """fit_weights() of Probabilities, from weights w, over the members where among (members,) is true."""
    among = torch.ones(len(p.fast), dtype=torch.bool) if among is None else among
    if w is None:                                       # all weight on the best member
        losses = torch.where(among, mean_log_p(p.log_p), -torch.inf)
        w = (torch.arange(len(losses)) == losses.argmax()).double()
    for attempt in range(200):
        support = w.nonzero()[:, 0]
        _, w[support], _ = newton(p.fast[support], w[support] / w[support].sum(), 1e-5)
        s = torch.where(among, p.ratios(w[support].float() @ p.fast[support]), 0)
        better = s.topk(min(32, len(s))).indices        # those whose share would lower the loss join,
        better = better[(s[better] > 1 + 1e-5) & (w[better] == 0)]
        if len(better) and attempt < 100:
            w[better] = 0.01                            # with a share: Newton starts inside
            continue
        near = (s > 1 - 1e-4).logical_or(w > 0).nonzero()[:, 0]         # float32 finds no more: in float64
        P = p.exact(near)
        _, w[near], _ = newton(P, w[near])
        mix = w[near] @ P
        s = torch.where(among, p.ratios(mix), 0).index_copy(0, near, P @ (1 / mix) / len(mix))
        gap = s.max().item() - 1
        if gap <= tolerance:
            return w, gap
    raise RuntimeError(f"the fit stopped at a gap of {gap}, above {tolerance}")


def fit_weights(log_p, tolerance=1e-7):
    """
    The weights w (members,) float64 on the simplex that minimise -mean_t log(sum_i w_i p_i,t), and the proven
    bound on their distance from the optimum in nats: gap = max_i mean_t(p_i,t / mix_t) - 1 <= tolerance
    (paper, eq. 8; the problem is convex); RuntimeError where it stays above. log_p: (members, tokens) float32
    log-probabilities of the targets, read only.
    """
    return fit(Probabilities(log_p), tolerance=tolerance)


# ------------------------------------------------------------------------------------ which K members

EXACT = 64      # up to so many members all pairs and exchanges are tried, of more so many exchanges


def reported(members):
    """The K for which prior.json holds members and weights: 1, 2, 4, ... and all."""
    return {members, *(2 ** i for i in range(members.bit_length()))}


def eliminate(p, members, w):
    """
    {K: (loss, members, weights)} down from these: the one without whom the loss rises least, to second order,
    goes, and the others are fitted again. Greedy: a start.
    """
    P = p.exact(members)
    loss, w, H = newton(P, w)
    found = {len(w): (loss, members, w)}
    while len(w) > 1:
        inverse = torch.linalg.inv(H)
        i = (w ** 2 / inverse.diagonal()).argmin()              # optimal brain surgeon (Hassibi, Stork 1993)
        rest = torch.arange(len(w)) != i
        w = (w - w[i] / inverse[i, i] * inverse[i])[rest].clamp(min=1e-3 / len(w))
        members, P = members[rest], P[rest]
        loss, w, H = newton(P, w / w.sum(), 1e-8)
        found[len(w)] = loss, members, w
    return found


def exchanges(p, members, w):
    """
    [(index in members, new member)]: the exchanges of one that can lower the loss of these fitted weights, in
    the order of the loss with the new one in the old one's share, on at most 2^13 tokens.
    """
    mix = w @ p.exact(members)
    ratios = p.ratios(mix).index_fill(0, members, 0)
    others = (ratios > 1 - 1e-6).nonzero()[:, 0]        # no other lowers the loss, even beside all of these
    some = slice(None, None, math.ceil(len(mix) / 2 ** 13))
    new, mix, losses = p.fast[others][:, some], mix[some].float(), []
    for member, old_share in zip(members, w):
        share = max(old_share.item(), 0.5 / len(w))
        rest = (mix - old_share * p.fast[member, some]).clamp(min=1e-30)
        rest *= (1 - share) / (1 - old_share).clamp(min=1e-9)
        losses.append(-(rest + share * new).log().mean(dim=1))
    order = torch.stack(losses).flatten().argsort()[:None if len(p.fast) <= EXACT else EXACT]
    return [(n // len(others), others[n % len(others)]) for n in order.tolist()]


def exchange(p, loss, members, w):
    """(loss, members, weights) once none of exchanges() lowers the loss of these fitted weights any more."""
    for i, new in exchanges(p, members, w):
        rest = torch.arange(len(w)) != i
        chosen = torch.cat([members[rest], new[None]])
        start = torch.cat([w[rest], w[i].clamp(min=0.5 / len(w))[None]])
        nearly, v, _ = newton(p.fast[chosen], start / start.sum(), 1e-5)
        if nearly < loss + 1e-6:
            exactly, v, _ = newton(p.exact(chosen), v)
            if exactly < loss - 1e-8:
                return exchange(p, exactly, chosen, v)
    return loss, members, w


def first_of(p, order, weights):
    """[(loss, members, weights)] of the first K = 1 .. of this order, their weights renormalised."""
    mix, found = 0, []
    for K, i in enumerate(order, 1):
        mix, chosen = mix + weights[i] * p.exact(i), weights[order[:K]]
        found.append((-(mix / chosen.sum()).log().mean().item(), order[:K], chosen / chosen.sum()))
    return found


def best_pair(p):
    """(loss, members, weights) of the best of all pairs."""
    pairs, half = torch.combinations(torch.arange(len(p.fast))), torch.full((2,), 0.5, dtype=torch.float64)
    losses = [newton(p.fast[pair], half, 1e-5)[0] for pair in pairs]
    pair = pairs[np.argmin(losses)]
    loss, w, _ = newton(p.exact(pair), half)
    return loss, pair, w


def fitted(p, members, w):
    """(loss, members, their optimal weights), from weights w."""
    w = w.clamp(min=0.01 / len(w))                              # Newton starts inside
    loss, w, _ = newton(p.exact(members), w / w.sum())
    return loss, members, w


def learned(p, weights, by_loss, rules):
    """
    [(members, weights)] for K = 1 .. all, of the lowest loss of those tried: K - 1's answer and an idle
    member, what the elimination leaves, what the rules [[(loss, members, weights), ..], ..] have for K; and
    what exchanges make of them where K is at most 8 or reported.
    """
    left = eliminate(p, weights.nonzero()[:, 0], weights[weights > 0])
    most, searched = max(left), reported(len(by_loss)) | set(range(2, 9))
    lowest, found = functools.partial(min, key=operator.itemgetter(0)), [rules[0][0]]
    for K in range(2, len(by_loss) + 1):
        loss, members, w = found[-1]
        idle = by_loss[~torch.isin(by_loss, members)][:1]       # an exchange puts the best in its place
        starts = [(loss, torch.cat([members, idle]), torch.cat([w, w.new_zeros(1)]))]
        if K <= most:
            starts.append(lowest([left[K], *(rule[K - 1] for rule in rules)]))
        if K < most:
            if K == 2 and len(by_loss) <= EXACT:
                starts = [best_pair(p)]
            elif K > 8:
                starts = [lowest(starts)]
            starts = [start if start is left[K] else fitted(p, *start[1:]) for start in starts]
            if K in searched:
                starts = [exchange(p, *start) for start in starts]
        found.append(lowest(starts))
    return [(members, w) for _, members, w in found]


def answers_for(log_p):
    """
    {rule: [(K members, weights) for K = 1 .. all]} and the gap of the fit. best: the member of lowest fitness
    loss; uniform: the K lowest, equal weights; topk: the K largest weights of the one fit, renormalised (the
    paper's); learned: the lowest loss that learned() finds, at K = 1 the best member.
    """
    p, by_loss = Probabilities(log_p), mean_log_p(log_p).argsort(descending=True, stable=True)
    weights, gap = fit(p)
    by_weight = by_loss[weights[by_loss].argsort(descending=True, stable=True)]
    uniform = first_of(p, by_loss, torch.ones_like(weights))
    topk = first_of(p, by_weight, weights)
    rules = dict(best=uniform[:1], uniform=uniform, topk=topk)
    rules = {rule: [(members, w) for _, members, w in answers] for rule, answers in rules.items()}
    return {**rules, "learned": learned(p, weights, by_loss, [uniform, topk])}, gap


def growing(members, log_p):
    """[(cycle, members, weights)]: the learned prior over the members up to each cycle."""
    cycles, p, w, grown = torch.tensor([c for _, c in members]), Probabilities(log_p), None, []
    for cycle in cycles.unique():
        w, _ = fit(p, w, cycles <= cycle)           # on from the weights of the cycle before
        there = (cycles <= cycle).nonzero()[:, 0]
        grown.append((cycle.item(), there, w[there]))
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
    kept = reported(len(members))
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
