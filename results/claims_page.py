"""
Tables for the paper's claims, from what is there of epochs.csv, ablations.csv, data.csv
(results/experiments.py) and claims.csv (results/claims.py): python results/claims_page.py writes claims.md.
"""
import csv
import itertools
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
from results.experiments import mean_error              # noqa: E402
from results.plans import ABLATIONS, PLANS              # noqa: E402
from tools.efficiency import multiple                   # noqa: E402

BUDGETS = 8, 16, 32, 64, 128
MODELS = {"independent cosine models": "independent", "independent warmdown models": "warmdown"}


class Table:
    """(text, variant) -> seed -> (what or rule, n or K) -> (fitness loss, validation loss)."""

    def __init__(self):
        self.rows, self.tflop = defaultdict(lambda: defaultdict(dict)), {}
        for plan in ("epochs", "ablations", "data", "claims"):
            path = RESULTS / f"{plan}.csv"
            for r in csv.DictReader(path.open(newline="")) if path.exists() else ():
                what = r.get("what") or r["rule"], int(r.get("n") or r["K"])
                self.rows[r["text"], r["variant"]][r["seed"]][what] = float(r["fit_loss"] or "nan"), float(
                    r["val_loss"])
                if r.get("tflop"):
                    self.tflop[r["variant"]] = float(r["tflop"])
        self.texts = list(dict.fromkeys(text for text, _ in self.rows))

    def of(self, text, variant, what, n=None):
        """{seed: (fitness, validation loss)}; n None: the largest; a K above the members: all."""
        found = {}
        for seed, losses in self.rows.get((text, variant), {}).items():
            sizes = sorted(size for name, size in losses if name == what)
            if sizes and (n is None or what == "learned" or n in sizes):
                found[seed] = losses[what, min(n or sizes[-1], sizes[-1])]
        return found


def cell(found):
    return mean_error([val for _, val, *_ in found.values()]) if found else ""


def table(lines, header, rows, labels=1):
    """Of the rows in which more than the labels, so many first cells, is there."""
    rows = [row for row in rows if any(row[labels:])]
    if rows:
        lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        lines.append("")


def difference(a, b):
    """[of each seed in both: validation loss of a less that of b]"""
    return [a[seed][1] - b[seed][1] for seed in a if seed in b]


def signed(values):
    return f"{mean_error(values, '+.4f')} (n = {len(values)})" if values else ""


# ----------------------------------------------------------------------------------------------- epochs

def best_split(t, text, E, kind="independent"):
    """{seed: (fitness, validation loss, epochs of a model)} of the independent models best on fitness."""
    splits = {n: t.of(text, f"{kind}_{n}", "first", E // n) for n in (8, 16, 32) if n <= E <= 64}
    return {seed: min((*losses[seed], n) for n, losses in splits.items() if seed in losses)
            for seed in sorted(set().union(*splits.values()))}


def crossing(t, text, x_of, K, target):
    """[of each seed that reaches it: where q0's curve over x_of(E) has the target's loss]"""
    found = []
    for seed, (_, loss, *_) in target.items():
        curve = [(x_of(E), t.of(text, f"q0_{E}", "learned", K)[seed][1]) for E in BUDGETS
                 if seed in t.of(text, f"q0_{E}", "learned", K)]
        if len(curve) > 1:
            reached = multiple(*zip(*curve), loss)
            found += [reached * curve[0][0]] if reached else []
    return found


def asymptote(t, text):
    """
    The a of a + b E^-c through q0's mean losses at the budgets E of most seeds, and its 68 % range over
    bootstraps of the seeds, as text: "not determined" where there are too few or the losses rise somewhere.
    """
    curves = {E: t.of(text, f"q0_{E}", "learned") for E in BUDGETS}
    curves = {E: of for E, of in curves.items() if len(of) == max(map(len, curves.values())) > 0}
    E, seeds = list(curves), set.intersection(*map(set, curves.values())) if curves else ()
    losses = np.array([[curve[seed][1] for curve in curves.values()] for seed in sorted(seeds)])  # seeds, E
    if len(seeds) < 2 or len(E) < 4 or (np.diff(losses.mean(axis=0)) >= 0).any():
        return "not determined"
    def fit(y):
        fits = []
        for c in np.arange(0.05, 4, 0.01):
            A = np.stack([np.ones(len(E)), np.array(E, float) ** -c], axis=1)
            (a, b), *_ = np.linalg.lstsq(A, y, rcond=None)
            fits.append((((A @ [a, b] - y) ** 2).sum(), a))
        return min(fits)[1]
    draws = itertools.product(range(len(losses)), repeat=len(losses))
    found = [fit(losses[list(some)].mean(axis=0)) for some in draws]
    low, high = np.percentile(found, (16, 84))
    return f"{fit(losses.mean(axis=0)):.3f} ({low:.3f} to {high:.3f}), by E = {', '.join(map(str, E))}"


def reached(t, text, target, name, lines):
    """Lines: at how many epochs and FLOPs q0 has the loss of these independent models of 64 epochs."""
    for K in (8, None) if t.of(text, "q0_64", "learned") and target else ():
        at, work = (crossing(t, text, x_of, K, target) for x_of in (int, lambda E: t.tflop[f"q0_{E}"]))
        fewer = [64 / x for x in at], [t.tflop["independent_8"] / x for x in work]
        line = f"q0, {f'K = {K}' if K else 'all'}, reaches the {name} in {len(at)} of {len(target)} seeds"
        if len(at) == len(target):
            line += (f", at {mean_error(at)} epochs, {mean_error(fewer[0])} times fewer; at "
                     f"{mean_error(fewer[1])} times fewer training FLOPs")
        lines.append(line + ".")


def epochs(t, text, lines):
    rows, pairs = [], []
    for E in BUDGETS:
        one = t.of(text, f"independent_{E}", "first", 1) if E < 64 else t.of(text, f"one_{E}", "first", 1)
        two, models = {32: "two_8", 64: "two_16"}.get(E), []
        for split in (best_split(t, text, E, kind) for kind in MODELS.values()):
            each = ", ".join(f"{E // n} x {n}" for n in sorted({n for *_, n in split.values()}))
            models.append(f"{cell(split)} ({each})" if each else "")
        rows.append([E, cell(one), *models, cell(t.of(text, "fresh_16", "first", E // 16)),
                     *(cell(t.of(text, f"q0_{E}", "learned", K)) for K in (1, 8, None)),
                     cell(t.of(text, two, "learned", 8)), cell(t.of(text, two, "learned"))])
    table(lines, ["epochs", "one model", *(f"{name}, best split (which)" for name in MODELS),
                  "chain of 16-epoch models", "q0, K = 1", "q0, K = 8", "q0, all", "2 trajectories, K = 8",
                  "2 trajectories, all"], rows)
    if student := t.of(text, "student_48", "best"):
        lines.append(f"A student of q0's K = 4 at 32 epochs, 48 epochs in all: {cell(student)}.")
    q0_32, q0_64, two_16 = (t.of(text, name, "learned") for name in ("q0_32", "q0_64", "two_16"))
    for name, kind in MODELS.items():
        split = best_split(t, text, 64, kind)
        reached(t, text, split, name, lines)
        pairs += [(f"{label}, {f'K = {K}' if K else 'all'}, less the {name}",
                   t.of(text, of, "learned", K), split)
                  for label, of in (("q0", "q0_64"), ("two trajectories", "two_16")) for K in (4, 8, None)]
        pairs += [(f"a chain of 16-epoch models less the {name}", t.of(text, "fresh_16", "first", 4), split)]
    for label, a, b in (
            *pairs, ("one trajectory less two, 64 epochs", q0_64, two_16),
            ("one trajectory less two, 32 epochs", q0_32, t.of(text, "two_8", "learned")),
            ("two trajectories, 64 epochs, less no chain", two_16, t.of(text, "two_16_no_chain", "learned")),
            ("q0 at 128 epochs less q0 at 64", t.of(text, "q0_128", "learned"), q0_64),
            ("the student of 48 epochs less q0 at 32", student, q0_32),
            ("the student of 48 epochs less q0 at 64", student, q0_64)):
        if d := difference(a, b):
            lines.append(f"Paired, {label}: {signed(d)}.")
    if q0_64:
        lines.append(f"Asymptote of q0 with all members: {asymptote(t, text)}.")


# -------------------------------------------------------------------------------------------- ablations

RULES = {"learned, all": ("learned", None), "learned, K = 8": ("learned", 8), "best member": ("best", 1)}


def pooled(runs):
    """
    (variance of a paired difference, degrees of freedom), pooled over all pairs of variants: twice that of
    the residuals of loss = variant's + seed's, by least squares. runs: variant -> Table.of().
    """
    rows = [(name, seed, loss) for name, of in runs.items() for seed, (_, loss) in of.items()]
    seeds, y = sorted({seed for _, seed, _ in rows}), np.array([loss for *_, loss in rows])
    A = np.array([[name == n for n in runs] + [seed == s for s in seeds] for name, seed, _ in rows], float)
    fit, _, rank, _ = np.linalg.lstsq(A, y, rcond=None)
    return 2 * ((y - A @ fit) ** 2).sum() / max(1, len(y) - rank), len(y) - rank


def verdict(mean, error):
    if not error:                           # one seed says nothing of another
        return "one seed"
    return "tie" if abs(mean) < 2 * error else "better" if mean < 0 else "worse"


def ablations(t, text, lines):
    names = [name for name in ABLATIONS if t.rows.get((text, name))]
    losses = {rule: {name: t.of(text, name, *of) for name in names} for rule, of in RULES.items()}
    errors = {rule: pooled(of) for rule, of in losses.items()}
    rows = []
    for name in names:
        cells = [f"`{name}`: {ABLATIONS[name].label}"]
        for rule, of in losses.items():
            if name == "q0_32":
                cells.append(cell(of[name]))
                continue
            d = difference(of[name], of["q0_32"])
            error = (errors[rule][0] / max(1, len(d))) ** 0.5
            cells.append(f"{np.mean(d):+.4f}, {verdict(np.mean(d), error)}" if d else "")
        members, mixture = t.of(text, name, "members"), t.of(text, name, "learned")
        gain, documents = difference(members, mixture), t.of(text, name, "documents").values()
        error = f"{np.mean([val for _, val in documents]):.4f}" if documents else ""
        rows.append([*cells, len(t.of(text, name, "learned")), error,
                     cell(members), mean_error(gain) if gain else "", cell(t.of(text, name, "kl"))])
    header = ["variant", *RULES, "n", "error over documents", "members' mean", "mixing adds", "KL"]
    if len(names) > 1:
        table(lines, header, rows)
    for rule, (variance, freedom) in errors.items() if len(names) > 1 else ():
        n = max(map(len, losses[rule].values()))
        lines.append(f"Standard error of a difference of {n} seeds, {rule}: {(variance / n) ** 0.5:.4f} "
                     f"({freedom} degrees of freedom).")


def averages(t, text, lines):
    columns = {"best member": ("best", 1), "weights of the last 2": ("average", 2), "of 4": ("average", 4),
               "of 8": ("average", 8), "greedy": ("greedy", None), "mixture of the last 8": ("last", 8),
               "learned, K = 8": ("learned", 8)}
    rows = [[ABLATIONS[name].label, *(cell(t.of(text, name, *of)) for of in columns.values())]
            for name in ABLATIONS if t.of(text, name, "average", 2)]
    table(lines, ["variant", *columns], rows)


# ------------------------------------------------------------------------------------------------ prior

def prior(t, text, lines):
    sizes = 1, 2, 4, 8, 16, 32
    rows = []
    for name, rule in itertools.product(("q0_32", "q0_64", "two_16"), ("uniform", "topk", "learned")):
        of = [t.of(text, name, rule, K) if K <= 16 or name != "q0_32" else {} for K in sizes]
        gains = [difference(x, t.of(text, name, "uniform", K)) for x, K in zip(of, sizes)]
        rows.append([f"`{name}`", rule, *(f"{cell(x)}" for x in of)])
        if rule != "uniform":
            rows.append(["", f"{rule} less uniform", *map(signed, gains)])
    table(lines, ["population", "rule", *(f"K = {K}" for K in sizes)], rows, labels=2)
    for K in ("K=8", "all"):
        cells = [cell(t.of(text, "q0_32", f"tokens {K}", n)) for n in (2048, 4096, 8192, None)]
        full = t.of(text, "q0_32", f"tokens {K}")
        costs = [signed(difference(t.of(text, "q0_32", f"tokens {K}", n), full)) for n in (2048, 4096, 8192)]
        table(lines, [f"fitness set, {K}", "2,048 tokens", "4,096", "8,192", "all"],
              [["validation loss", *cells], ["less that of all tokens", *costs, ""]])
    rows = []
    for K in ("K=8", "all"):
        own = t.of(text, "q0_32", f"tokens {K}")
        rows.append([K, cell(own), cell(t.of(text, "q0_32", f"other {K}")),
                     cell(t.of(text, "q0_32", f"at home {K}")), cell(t.of(text, "q0_32", f"abroad {K}")),
                     cell(t.of(text, "q0_32", "abroad uniform"))])
    table(lines, ["members and weights", "fitted here, loss here", "fitted on the other text, loss here",
                  "fitted there, loss there", "fitted here, loss there", "equal weights of all, there"], rows)


def data(t, text, lines):
    curve = {}              # times the text -> (the best epochs, {seed: (fitness, validation loss)})
    for times, runs in {1: {E: f"independent_{E}" for E in (8, 16, 32)} | {64: "one_64"},
                        **{n: {int(name.split("_")[2]): name for name in PLANS["data"][0]
                               if name.startswith(f"data_{n}_")} for n in (2, 4, 8, 16)}}.items():
        of = {E: t.of(text, name, "first" if times == 1 else "best", 1) for E, name in runs.items()}
        if seeds := set.intersection(*([set(losses) for losses in of.values() if losses] or [set()])):
            E = min((E for E in of if of[E]), key=lambda E: np.mean([of[E][seed][0] for seed in seeds]))
            curve[times] = E, of[E]
    if len(curve) < 2:
        return
    table(lines, ["times the text", "one model, best epochs (which; chosen on the seeds that have all)", "n"],
          [[times, f"{cell(losses)} ({E})", len(losses)] for times, (E, losses) in curve.items()])
    # the curve of the population's own seed: its error is in that of the multiple, too
    own = {s: [(times, of[s][1]) for times, (_, of) in curve.items() if s in of] for s in curve[1][1]}
    for label, found in {"q0, 64 epochs, all": t.of(text, "q0_64", "learned"),
                         "2 x 16 cycles, all": t.of(text, "two_16", "learned"),
                         "2 x 16 cycles, K = 8": t.of(text, "two_16", "learned", 8),
                         "the student of 48 epochs": t.of(text, "student_48", "best"),
                         **{f"{name}, 64 epochs": best_split(t, text, 64, kind)
                            for name, kind in MODELS.items()}}.items():
        found = {seed: val for seed, (_, val, *_) in found.items() if len(own.get(seed, ())) > 1}
        worth = [multiple(*zip(*own[seed]), val) for seed, val in found.items()]
        if worth:
            low = any(val > own[seed][0][1] for seed, val in found.items())
            outside = "less than 1" if low else "more than the most"
            lines.append(f"{label}: {outside if None in worth else mean_error(worth)} times the text "
                         f"(n = {len(worth)}).")


def main():
    t, lines = Table(), [
        "# The paper's claims in the laboratory: tables", "",
        "Printed by `python results/claims_page.py` from epochs.csv, ablations.csv, data.csv and claims.csv. "
        "The demo's model (1.5M parameters), 16 KB to train on; validation loss in nats per byte, mean +- "
        "standard error over seeds; what each variant is stands in epochs.md and ablations.md. All choices "
        "are made on the fitness set."]
    for text in t.texts:
        for title, of in {"loss against epochs": epochs, "ablations at 1 x 16 cycles, less q0_32": ablations,
                          "averaging weights instead of probabilities": averages, "the prior": prior,
                          "data efficiency": data}.items():
            section = []
            of(t, text, section)
            if section:
                lines += [f"\n## {text}: {title}", *section]
    (RESULTS / "claims.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
