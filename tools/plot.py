"""
The picture of a population: python -m tools.plot CONFIG [--name=value ...]
Reads run_dir/prior.json, writes run_dir/prior.png: the loss against K for each rule, and each member's against its cycle.
"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from config import from_args, refuse
from population import read_json

RULES = {"uniform": ("K lowest losses, equal weights", "tab:gray"), "topk": ("K largest weights (paper)", "tab:orange"),
         "learned": ("learned prior: the same K, refitted", "tab:blue")}


def mean_and_spread(rows):
    """(mean, standard deviation; 0 for one) over the runs, the first axis."""
    rows = np.array(rows)
    return rows.mean(axis=0), rows.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1:])


def draw(priors, path, singles=()):
    """
    The figure of one population, or of repeats of it with other seeds: mean and spread. priors: contents of prior.json;
    singles: (label, loss) of models trained alone, as lines to compare with.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    of = lambda prior, rule: [a for a in prior["answers"] if a["rule"] == rule]
    for rule, (label, color) in RULES.items():
        K = [a["K"] for a in of(priors[0], rule)]
        mean, spread = mean_and_spread([[a["val_loss"] for a in of(prior, rule)] for prior in priors])
        left.errorbar(K, mean, spread, color=color, marker="o", markersize=4, capsize=3, label=label)
    best = mean_and_spread([of(prior, "best")[0]["val_loss"] for prior in priors])[0]
    left.axhline(best, color="tab:red", ls="--", label="best single member, chosen on the fitness set")
    for (label, loss), style in zip(singles, ("-", "-.", ":")):
        left.axhline(loss, color="black", lw=1, ls=style, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(K, [str(k) for k in K])
    left.set_xlabel("K, members that answer (= forward passes)")
    left.set_ylabel("validation loss, nats per token")
    left.set_title("A population against its best member")
    left.legend(frameon=False, fontsize=8)
    for t in sorted({m["trajectory"] for m in priors[0]["members"]}):
        mine = [[m for m in prior["members"] if m["trajectory"] == t] for prior in priors]
        mean, spread = mean_and_spread([[m["val_loss"] for m in members] for members in mine])
        right.errorbar([m["cycle"] for m in mine[0]], mean, spread, marker=".", capsize=2, label=f"trajectory {t}")
    right.axhline(of(priors[0], "learned")[-1]["val_loss"] if len(priors) == 1 else mean_and_spread([of(p, "learned")[-1]["val_loss"] for p in priors])[0],
                  color="tab:blue", ls="--", label="learned prior over all")
    right.set_xlabel("cycle")
    right.set_title("Each member alone")
    right.legend(frameon=False, fontsize=8)
    if len(priors) > 1:
        figure.supxlabel(f"mean and standard deviation over {len(priors)} seeds", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    config = from_args(argv, __doc__)
    path = Path(config.run_dir) / "prior.json"
    if not path.exists():
        refuse(f"no {path}: run prior.py on this config first")
    draw([read_json(path)], path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
