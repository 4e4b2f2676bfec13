"""
Which K members, and how sure: python results/prior.py NAME CONFIG [--name=value ...] [--repeats=42,1042,2042] [--resamples=50]
On finished runs of a config (with repeats, of run_dir followed by _SEED), from the scores of their members:
  1. rules for choosing K members, on all fitness documents and, honestly, chosen on one half and judged on the other
  2. bootstrap over fitness documents: how far the validation loss of a rule, and the difference of two, depend on them
  3. what a fitness set of this size costs against weights fitted on the validation set itself, as a curve over its size
Writes results/prior_NAME.md. Losing rules live here only; prior.py has the winner.
"""
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args, take_actions                                              # noqa: E402
from data import loader                                                                  # noqa: E402
from errors import refuse                                                                # noqa: E402
from population import Run                                                               # noqa: E402
from prior import eliminate, fit_on, fit_weights, mean_log_p, paired_error               # noqa: E402
from results.demo import commit                                                         # noqa: E402
from tests.parity import adamw300                                                        # noqa: E402


# ------------------------------------------------- rules: log_p -> [(members, weights) for K = 1 .. all]

def largest(log_p):
    """The paper's: the K largest weights, renormalised."""
    w, _ = fit_weights(log_p)
    order = w.argsort(descending=True, stable=True)
    return [(order[:K], w[order[:K]] / w[order[:K]].sum()) for K in range(1, len(w) + 1)]


def refitted(log_p):
    """The same members, fitted again."""
    return [(members, fit_weights(log_p[members])[0]) for members, _ in largest(log_p)]


def eliminated(log_p):
    w, _ = fit_weights(log_p)
    left = eliminate(log_p, w)
    return [left[min(K, max(left))] for K in range(1, len(w) + 1)]


def gains(P, mix):
    """Newton's estimate, in one dimension, of what a share of each member would gain."""
    R = P / mix
    s, h = R.mean(dim=1), (R - 1).square().mean(dim=1)
    return (s - 1).clamp(min=0).square() / (2 * h + 1e-12)


def joined(P, S, w, i=None):
    """
    (members, weights, loss) of S without its i-th, and with the member that would gain most,
    fitted again; i None: S + one.
    """
    keep = [n for n in range(len(S)) if n != i]
    rest, v = [S[n] for n in keep], w[keep] / w[keep].sum()
    gain = gains(P, v @ P[rest])
    gain[S] = -1
    rest = rest + [gain.argmax().item()]
    v = fit_on(P[rest], torch.cat([0.9 * v, torch.tensor([0.1], dtype=torch.float64)]))
    return rest, v, -(v @ P[rest]).log().mean().item()


def forward(log_p, exchange=False):
    """
    Forward selection: the member that would gain most joins, all are fitted again;
    with exchange, members are swapped while it pays.
    """
    P = log_p.double().clamp(min=-700).exp()
    S, w, found = [mean_log_p(log_p).argmax().item()], torch.ones(1, dtype=torch.float64), []
    for K in range(1, len(P) + 1):
        if K > 1:
            S, w, loss = joined(P, S, w)
        while exchange and K > 1:
            S2, w2, loss2 = min((joined(P, S, w, i) for i in range(K) if w[i] < 1), key=lambda swap: swap[2])
            if loss2 > loss - 1e-7:
                break
            S, w, loss = S2, w2, loss2
        found.append((torch.tensor(S), w))
        if (P / (w @ P[S])).mean(dim=1).max() - 1 < 1e-7:       # the optimum over all: nothing more to gain
            break
    return found + found[-1:] * (len(P) - len(found))


RULES = {"K largest weights (paper)": largest, "the same, refitted": refitted, "forward selection": forward,
         "forward selection, exchanges": lambda log_p: forward(log_p, exchange=True), "backward elimination": eliminated}


# ------------------------------------------------------------------------------------ the measurements

def losses(answers, log_p):
    """Of each answer, in nats per token."""
    return [-(w @ log_p[m].double().exp()).log().mean().item() for m, w in answers]


def halves(log_p, documents):
    """
    rule -> (mean over K of its loss minus that of the paper's members refitted, standard error over documents). Chosen on
    one half of the fitness documents and judged on the other, both ways round.
    """
    sizes = torch.bincount(documents).double()
    half = torch.from_numpy(np.random.default_rng(0).permutation(len(sizes)) % 2)[documents]
    nats = {name: torch.zeros(len(sizes), dtype=torch.float64) for name in RULES}
    for side in (0, 1):
        judged = half != side
        for name, rule in RULES.items():
            answers = rule(log_p[:, half == side])
            for m, w in answers:
                nats[name].index_add_(0, documents[judged], -(w @ log_p[m][:, judged].double().exp()).log() / len(answers))
    base = nats["the same, refitted"]
    return {name: ((n - base).sum().item() / sizes.sum().item(), paired_error(n - base, sizes)) for name, n in nats.items()}


def resample(documents, generator, count=None):
    """Positions of the tokens of whole documents, drawn with replacement, or `count` of them without."""
    places = np.split(np.arange(len(documents)), np.flatnonzero(np.diff(documents)) + 1)
    drawn = generator.integers(len(places), size=len(places)) if count is None else generator.permutation(len(places))[:count]
    return torch.from_numpy(np.concatenate([places[i] for i in drawn]))


def bootstrap(log_p, val, documents, Ks, resamples):
    """
    K -> standard deviations, over resampled fitness sets,
    of the validation loss of paper's rule, elimination, and their difference.
    """
    generator, rows = np.random.default_rng(1), []
    for _ in range(resamples):
        again = log_p[:, resample(documents.numpy(), generator)]
        paper, ours = largest(again), eliminated(again)
        rows.append([[losses([a[K - 1]], val)[0] for K in Ks] for a in (paper, ours)])
    rows = np.array(rows)
    return {K: (*rows[:, :, i].std(axis=0, ddof=1), (rows[:, 1, i] - rows[:, 0, i]).std(ddof=1)) for i, K in enumerate(Ks)}


def fitness_sizes(log_p, val, documents):
    """
    [(documents, tokens, mean nats above the weights fitted on validation itself, sd)]
    of weights fitted on a part of the fitness set.
    """
    best, count, generator, rows = (losses([(torch.arange(len(val)), fit_weights(val)[0])], val)[0],
                                    int(documents.max()) + 1, np.random.default_rng(2), [])
    for part in sorted({max(1, count >> i) for i in range(6)}):
        costs, tokens = [], []
        for _ in range(1 if part == count else 10):
            places = resample(documents.numpy(), generator, part)
            costs.append(losses([(torch.arange(len(val)), fit_weights(log_p[:, places])[0])], val)[0] - best)
            tokens.append(len(places))
        rows.append((part, np.mean(tokens), np.mean(costs), np.std(costs, ddof=1) if len(costs) > 1 else float("nan")))
    return best, rows


# ---------------------------------------------------------------------------------------------- the page

def page(label, config, options):
    """The lines of one run."""
    data = loader.load(config)
    run = Run(config, data.fingerprint)
    members = run.members()
    fit, val = (torch.from_numpy(np.stack([run.read_scores(split, *m, getattr(data, split)[:, 1:].size)[0]
                                            for m in members]))
                for split in ("fit", "val"))
    documents = torch.from_numpy(data.fit_documents)
    if documents.max() == 0:
        refuse("the fitness set is one document, which has no halves to choose on and to judge on: give shorter documents")
    Ks = sorted(({2 ** i for i in range(len(members).bit_length())} | {3, 6, 12, len(members)})
                & set(range(1, len(members) + 1)))
    honest = halves(fit, documents)
    lines = [f"## {label}", "",
             f"{len(members)} members; fitness set of {fit.shape[1]:,} tokens in {int(documents.max()) + 1} documents, "
                 f"validation of {val.shape[1]:,}.", "",
             "Validation loss (fitness loss) when chosen on the whole fitness set; "
                 "last, chosen on one half and judged on the other, both ways: "
                 "loss minus that of the second rule, mean over every K, with its standard error over documents.", "",
             "| rule | " + " | ".join(f"K = {K}" for K in Ks) + " | other half |", "|---" * (len(Ks) + 2) + "|"]
    for name, rule in RULES.items():
        answers = rule(fit)
        v, f = losses([answers[K - 1] for K in Ks], val), losses([answers[K - 1] for K in Ks], fit)
        lines.append(f"| {name} | " + " | ".join(f"{x:.4f} ({y:.4f})" for x, y in zip(v, f))
                     + f" | {honest[name][0]:+.4f} +- {honest[name][1]:.4f} |")
    script = adamw300(fit.exp())
    theirs, optimum = losses([(torch.arange(len(fit)), w) for w in (script, fit_weights(fit)[0])], fit)
    lines += ["", f"The public script's 300 AdamW steps end {theirs - optimum:.1e} nats above the optimum of the fitness set."]
    spread = bootstrap(fit, val, documents, Ks, options.resamples)
    lines += ["",
              f"Standard deviation of the validation loss over {options.resamples} fitness sets of resampled documents:", "",
              "| | " + " | ".join(f"K = {K}" for K in Ks) + " |", "|---" * (len(Ks) + 1) + "|"]
    for i, name in enumerate(("K largest weights (paper)", "backward elimination", "their difference")):
        lines.append(f"| {name} | " + " | ".join(f"{spread[K][i]:.4f}" for K in Ks) + " |")
    best, rows = fitness_sizes(fit, val, documents)
    lines += ["",
              f"What the fitness set's size costs: validation loss above {best:.4f}, "
                  "the optimum fitted on the validation set itself (random documents, 10 draws):", "",
              "| documents | tokens | nats above the optimum | sd |", "|---|---|---|---|"]
    return lines + [f"| {d} | {t:,.0f} | {c:.4f} | {'-' if np.isnan(sd) else f'{sd:.4f}'} |" for d, t, c, sd in rows] + [""]


def main(argv=None):
    options, argv = take_actions(argv, repeats="", resamples=50)
    if not argv or argv[0].startswith("-") or argv[0].endswith(".py"):
        refuse("want a name for the page before the config: python results/prior.py manual configs/tiny.py ...")
    name, argv = argv[0], argv[1:]
    config = from_args(argv, __doc__)
    runs = [(f"seed {seed}", from_args([*argv, f"--seed={seed}", f"--run_dir={config.run_dir}_{seed}"], __doc__))
            for seed in filter(None, options.repeats.split(","))]
    text = loader.text_source(config)
    lines = [f"# Which K members, and how sure: {name}", "",
             f"Printed by `python results/prior.py {' '.join(sys.argv[1:])}` at commit {commit()}.",
             f"Text: {Path(text.get('data', 'FineWeb')).name}, SHA-256 {text.get('text_sha256')}. "
                 "Losses in nats per token.", ""]
    for label, of in runs or [(config.run_dir, config)]:
        lines += page(label, of, options)
    (ROOT / "results" / f"prior_{name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
