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
import itertools
import math
import operator
import sys
import textwrap

import numpy as np
import torch
import torch.nn.functional as F

from data import loader
from infra.config import from_args, student_of
from infra.console import fail, next_command, print0, progress_bar, script
from infra.distributed import cores, join
from infra.files import write_json
from infra.run_directory import SPLITS, RunDirectory
from model import GPT

BLOCK = 1 << 13         # tokens of all members held in float64 at once


# --------------------------------------------------------------------------------------------- the fit

def probabilities(log_p):
    """
    (members, tokens) float64 of log_p, divided by the largest that any member gives to the token, which
    shifts the losses of all mixtures alike; then at least e^-40, the one approximation.
    """
    p = log_p.double().clamp(min=-700)
    return p.sub_(p.max(dim=0).values).clamp_(min=-40).exp_()


def ratios(p, mix):
    """mean_t(p_i,t / mix_t) of every member i: above 1 where a share of it would lower the loss."""
    return p @ (1 / mix) / len(mix)


def hessian(P, mix, dtype=torch.float32):
    """Of -mean log(w @ P), (k, k) float64, at w @ P = mix; its sums in dtype."""
    R = P.to(dtype) * (len(mix) ** -0.5 / mix).to(dtype)
    H = (R @ R.T).double()
    return H + 1e-6 * H.diagonal().diag()       # a ridge: copies of a member share its weight


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


def newton(P, w, target=math.inf):
    """
    (loss, w): argmin of -mean log(w @ P) over the simplex, from w (k,) > 0, for few members P (k, tokens).
    Stops early, with the w at hand, once it is proven that no w has a loss below the target.
    """
    def loss(w, mix):                       # the same for all multiples of w
        return w.sum().log() - mix.log().mean()
    mix, dtype = w @ P, torch.float32
    now = loss(w, mix)
    for _ in range(100):
        s = ratios(P, mix)                  # the gradient is 1 - s; the optimum at most max(s) - 1 lower
        if s.max() - 1 < max(1e-10, now - target):
            break
        H = hessian(P, mix, dtype)          # of w.sum() - mix.log().mean(), of the same minimum
        y = nonnegative_qp(H, H @ w + s - 1, w)
        dw, dmix, t = y - w, y @ P - mix, 1.0
        slope = (1 - s) @ dw
        if slope > -1e-22:                  # no gain: converged, or float32 hid how near-copies differ
            if dtype == torch.float64:
                break
            dtype = torch.float64
            continue
        while (then := loss(w + t * dw, mix + t * dmix)) > now + 1e-4 * t * slope + 1e-15 and t > 1e-8:
            t /= 2
        w, mix, now = w + t * dw, mix + t * dmix, then
        w, mix = w / w.sum(), mix / w.sum()
    return now.item(), w


def fit(p, w=None, tolerance=1e-7):
    """fit_weights() of probabilities p, from weights w (None: all on the best member)."""
    w = F.one_hot(p.log().mean(dim=1).argmax(), len(p)).double() if w is None else w
    for _ in range(200):
        support = w.nonzero()[:, 0]
        P = p[support]
        _, w[support] = newton(P, w[support] / w[support].sum())
        s = ratios(p, w[support] @ P)
        gap = s.max().item() - 1
        if gap <= tolerance:
            return w, gap
        # the members whose share would lower the loss most join, with a share: Newton wants w > 0
        best = s.topk(min(32, len(s))).indices
        w[best[(s[best] > 1 + tolerance) & (w[best] == 0)]] = 0.01
    raise RuntimeError(f"the fit stopped at a gap of {gap}, above {tolerance}")


def fit_weights(log_p, tolerance=1e-7):
    """
    The weights w (members,) float64 on the simplex that minimise -mean_t log(sum_i w_i p_i,t), and the proven
    bound on their distance from the optimum in nats: gap = max_i mean_t(p_i,t / mix_t) - 1 <= tolerance
    (paper, eq. 8; the problem is convex); RuntimeError where it stays above. log_p: (members, tokens) float32
    log-probabilities of the targets, read only.
    """
    return fit(probabilities(log_p), tolerance=tolerance)


# ------------------------------------------------------------------------------------ which K members

EXACT = 64      # up to so many members all pairs and exchanges are tried, of more the likeliest so many


def reported(members):
    """The K for which prior.json holds members and weights: 1, 2, 4, ... and all."""
    return {members, *(2 ** i for i in range(members.bit_length()))}


def lowest(found):
    """The (loss, members, weights) of the lowest loss."""
    return min(found, key=operator.itemgetter(0))


def interior(w):
    """Weights near w, none of them 0: Newton starts there."""
    w = w.clamp(min=0.01 / len(w))
    return w / w.sum()


def fitted(p, members, w):
    """(loss, members, their optimal weights), from weights w."""
    loss, w = newton(p[members], interior(w))
    return loss, members, w


def eliminate(p, members, w):
    """
    {K: (loss, members, weights)} down from these: the one without whom the loss rises least, to second order,
    goes, and the others are fitted again. Greedy: a start.
    """
    P, found = p[members], {}
    while len(w) > 0:
        loss, w = newton(P, interior(w))
        found[len(w)] = loss, members, w
        inverse = torch.linalg.inv(hessian(P, w @ P))
        i = (w ** 2 / inverse.diagonal()).argmin()              # optimal brain surgeon (Hassibi, Stork 1993)
        rest = (torch.arange(len(w)) != i).nonzero()[:, 0]
        members, P, w = members[rest], P[rest], (w - w[i] / inverse[i, i] * inverse[i])[rest]
    return found


def exchanges(p, members, w):
    """
    [(index in members, new member)]: the exchanges of one that can lower the loss of these fitted weights,
    ranked by an estimate: the new one takes the old one's weight, nothing is fitted, on at most 2^13 tokens.
    """
    mix = w @ p[members]
    # members with a ratio of at most 1 could not lower the loss even as one more: left out
    others = (ratios(p, mix).index_fill(0, members, 0) > 1 - 1e-6).nonzero()[:, 0]
    some = slice(None, None, math.ceil(len(mix) / 2 ** 13))
    old, new, mix, losses = p[members, some].float(), p[others, some].float(), mix[some].float(), []
    for p_old, old_share in zip(old, w):
        share = max(old_share.item(), 0.5 / len(w))
        rest = (mix - old_share * p_old).clamp(min=1e-30) * (1 - share) / (1 - old_share).clamp(min=1e-9)
        losses.append(-(rest + share * new).log().mean(dim=1))
    order = torch.stack(losses).flatten().argsort()[:None if len(p) <= EXACT else EXACT]
    return [(n // len(others), others[n % len(others)]) for n in order.tolist()]


def exchange(p, loss, members, w):
    """(loss, members, weights) once none of exchanges() lowers the loss of these fitted weights any more."""
    P, bound = p[members], loss - 1e-8
    for i, new in exchanges(p, members, w):
        P[i] = p[new]
        loss_then, w_then = newton(P, interior(w), bound)
        if loss_then < bound:
            P = None                        # free before the next round
            return exchange(p, loss_then, torch.where(torch.arange(len(w)) == i, new, members), w_then)
        P[i] = p[members[i]]
    return loss, members, w


def first_of(p, order, weights):
    """[(loss, members, weights)] of the first K = 1 .. of this order, their weights renormalised."""
    mix, found = 0, []
    for K, i in enumerate(order, 1):
        mix, chosen = mix + weights[i] * p[i], weights[order[:K]]
        found.append((-(mix / chosen.sum()).log().mean().item(), order[:K], chosen / chosen.sum()))
    return found


def best_pair(p):
    """(loss, members, weights) of the best of all pairs."""
    best, half = (math.inf, None, None), torch.full((2,), 0.5, dtype=torch.float64)
    for pair in torch.combinations(torch.arange(len(p))):
        loss, w = newton(p[pair], half, target=best[0])
        best = lowest([best, (loss, pair, w)])
    return best


def learned(p, weights, by_loss, rules):
    """
    [(loss, members, weights)] for K = 1 .. all, each the lowest of its starts, fitted: K - 1's answer with
    one more member, and the best of what elimination and the rules (lists like this one) have for K. Where K
    is at most 8 or reported, exchanges improve each start. Beyond the number of members with weight in the
    fit of all, the best of the others are appended with weight 0.
    """
    left = eliminate(p, weights.nonzero()[:, 0], weights[weights > 0])
    found = [rules[0][0]]                                       # K = 1: the best member
    for K in range(2, len(by_loss) + 1):
        loss, members, w = found[-1]
        idle = by_loss[~torch.isin(by_loss, members)][:1]       # exchanges may put a better one in its place
        found.append((loss, torch.cat([members, idle]), torch.cat([w, w.new_zeros(1)])))
        if K <= len(left):
            starts = [found[-1], lowest([left[K], *(rule[K - 1] for rule in rules)])]
            starts = [fitted(p, *start[1:]) for start in (starts if K <= 8 else [lowest(starts)])]
            if K == 2 and len(by_loss) <= EXACT:
                starts.append(best_pair(p))
            if K <= 8 or K in reported(len(by_loss)):
                starts = [exchange(p, *start) for start in starts]
            found[-1] = lowest(starts)
    return found


def answers_for(log_p):
    """
    {rule: [(K members, weights) for K = 1 .. all]} and the gap of the fit. best: the member of lowest fitness
    loss; uniform: the K lowest, equal weights; topk: the K largest weights of the one fit, renormalised (the
    paper's); learned: the lowest loss that learned() finds, at K = 1 the best member.
    """
    p = probabilities(log_p)
    losses, (weights, gap) = -log_p.double().clamp(min=-700).mean(dim=1), fit(p)
    by_loss = losses.argsort(stable=True)
    by_weight = by_loss[weights[by_loss].argsort(descending=True, stable=True)]
    uniform, topk = first_of(p, by_loss, torch.ones_like(weights)), first_of(p, by_weight, weights)
    rules = dict(best=uniform[:1], uniform=uniform, topk=topk,
                 learned=learned(p, weights, by_loss, [uniform, topk]))
    answers = {rule: [(members, w) for _, members, w in found] for rule, found in rules.items()}
    return answers, gap


def growing(members, log_p):
    """[(cycle, members, weights)]: the learned prior over the members up to each cycle."""
    cycles, order = torch.tensor([c for _, c in members]).sort(stable=True)
    p, w, grown = probabilities(log_p[order]), torch.zeros(0, dtype=torch.float64), []
    for cycle in cycles.unique():
        n = int((cycles <= cycle).sum())
        w, _ = fit(p[:n], F.pad(w, (0, n - len(w)), value=0.01))        # on from the cycle before
        there, places = order[:n].sort()                # back in the given order
        grown.append((cycle.item(), there, w[places]))
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
    mine = members[ranks.rank::ranks.world_size]
    todo = [(*member, splits) for member in mine if (splits := unscored(member))]
    model = model_to_score(config).to_device(ranks.device, config.compile) if todo else None
    for t, c, splits in progress_bar(todo, unit="member", desc="scoring", disable=ranks.rank > 0 or not todo):
        sha256, losses = load_member(model, run, t, c), {}
        for split in splits:
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
    mixtures = {"members": alone, "growing": [tuple(mixture) for _, *mixture in grown], **rules}
    best = int(rules["best"][0][0])             # its place among the mixtures, too
    rows = iter(evaluate(list(itertools.chain(*mixtures.values())), best, log_p, data))
    losses = {kind: list(itertools.islice(rows, len(of))) for kind, of in mixtures.items()}
    result = dict(
        text=loader.read_about(config), distill_from=config.distill_from, gap=gap, answers=[], losses={},
        members=[dict(trajectory=t, cycle=c, weights_sha256=sha256, **row)
                 for (t, c), (_, sha256), row in zip(members, scores["fit"], losses["members"])],
        growing=[dict(cycle=cycle, members=len(chosen),
                      epochs=sum(config.cycle_epochs(members[i][1]) for i in chosen), **row)
                 for (cycle, chosen, _), row in zip(grown, losses["growing"])])
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
