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


def curve(axes, x, rows, **style):
    """One line of the mean over repeats (rows), with their standard deviation as bars where there are several."""
    rows = np.array(rows)
    axes.errorbar(x, rows.mean(axis=0), rows.std(axis=0, ddof=1) if len(rows) > 1 else None, capsize=3, markersize=4, **style)


def draw(priors, path, singles=()):
    """
    The figure of one population, or of its repeats with other seeds. priors: contents of prior.json; singles: (label,
    loss) of models trained alone, as lines to compare with.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True)
    answers = lambda rule, key: [[a[key] for a in prior["answers"] if a["rule"] == rule] for prior in priors]
    for rule, (label, color) in RULES.items():
        K = answers(rule, "K")[0]
        curve(left, K, answers(rule, "val_loss"), color=color, marker="o", label=label)
    left.axhline(np.mean(answers("best", "val_loss")), color="tab:red", ls="--", label="best single member, chosen on the fitness set")
    for (label, loss), style in zip(singles, ("-", "-.", ":")):
        left.axhline(loss, color="black", lw=1, ls=style, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(K, [str(k) for k in K])
    left.set_xlabel("K, members that answer (each costs a forward pass)")
    left.set_ylabel("validation loss, nats per token")
    left.set_title("A population against its best member")
    for t in sorted({m["trajectory"] for m in priors[0]["members"]}):
        mine = [[m for m in prior["members"] if m["trajectory"] == t] for prior in priors]
        curve(right, [m["cycle"] for m in mine[0]], [[m["val_loss"] for m in members] for members in mine], marker=".", label=f"trajectory {t}")
    right.axhline(np.mean([losses[-1] for losses in answers("learned", "val_loss")]), color="tab:blue", ls="--", label="learned prior over all members")
    right.set_xlabel("cycle (the member at its end)")
    right.set_title("Each member alone")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    text, repeats = priors[0]["text"], f"mean and standard deviation over {len(priors)} seeds; " if len(priors) > 1 else ""
    figure.supxlabel(f"{repeats}text: {text.get('data', 'FineWeb')}, SHA-256 {text.get('text_sha256', 'unknown')[:16]}", fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    config = from_args(argv, __doc__)
    path = Path(config.run_dir) / "prior.json"
    if not path.exists():
        refuse(f"no {path}: run prior.py on this config first")
    draw([read_json(path)], path.with_suffix(".png"))
    print(f"results are in {config.run_dir}: prior.json, prior.png, metrics.jsonl")


if __name__ == "__main__":
    main()
