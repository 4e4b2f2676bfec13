"""
The picture of a population: python -m tools.plot CONFIG [--name=value ...] [--beside=RUN_DIR,RUN_DIR,...]
Reads run_dir/prior.json, writes run_dir/prior.png: loss against K for each rule, each member's loss and the
mixture's after each cycle, the weights, and loss against training epochs, beside the finished runs of other
configs; and its student, where prior.py --student has weighed one.
"""
import itertools
import os
from pathlib import Path

os.environ.pop("MPLBACKEND", None)          # a notebook's perhaps, which matplotlib would look for
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from infra.config import from_args, student_of
from infra.console import fail, script
from infra.files import write_whole
from infra.run_directory import load_prior

RULES = {"uniform": ("K lowest losses, equal weights", "tab:gray"),
         "topk": ("K largest weights (the paper's)", "tab:orange"),
         "learned": ("learned prior, K members", "tab:blue")}


def curve(axes, x, rows, errors=None, **style):
    """One line: the mean over repeats (rows), bars their standard deviation, or one row with its errors."""
    rows = np.array(rows)
    bars = rows.std(axis=0, ddof=1) if len(rows) > 1 else errors
    axes.errorbar(x, rows.mean(axis=0), bars, capsize=3, markersize=4, **style)


def pick(priors, rule, key):
    """Of every prior, one figure of a rule's answers, for each K that is kept."""
    return [[a[key] for a in prior["answers"] if a["rule"] == rule] for prior in priors]


def loss_against_K(axes, priors):
    common = set.intersection(*({a["rule"] for a in prior["answers"]} for prior in priors)) - {"best"}
    for rule in [rule for rule in dict.fromkeys(a["rule"] for a in priors[0]["answers"]) if rule in common]:
        label, color = RULES.get(rule, (rule, "tab:purple"))        # a new rule is drawn under its own name
        K = pick(priors, rule, "K")[0]
        errors = np.array(pick(priors, rule, "val_error")[0], dtype=float)      # nan for a single document
        curve(axes, K, pick(priors, rule, "val_loss"), errors, color=color, marker="o", label=label)
    axes.axhline(np.mean(pick(priors, "best", "val_loss")), color="tab:red", ls="--",
                 label="best single member, chosen on the fitness set")
    axes.set_xscale("log", base=2)
    K = pick(priors, "learned", "K")[0]
    axes.set_xticks(K, [str(k) for k in K])
    axes.set(xlabel="K, members that answer (each costs a forward pass)",
             title="A population against its best member")


def loss_against_cycle(axes, priors):
    axes.set_prop_cycle(color=["tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive"])
    for t in sorted({m["trajectory"] for m in priors[0]["members"]}):
        mine = [[m for m in prior["members"] if m["trajectory"] == t] for prior in priors]
        curve(axes, [m["cycle"] for m in mine[0]], [[m["val_loss"] for m in members] for members in mine],
              marker=".", label=f"member of trajectory {t}, alone")
    grown = [prior["growing"] for prior in priors]
    curve(axes, [g["cycle"] for g in grown[0]], [[g["val_loss"] for g in row] for row in grown],
          color="tab:blue", marker="o", label="learned prior over all members so far")
    if 0 < priors[0]["distill_from"] < len(grown[0]):
        axes.axvline(priors[0]["distill_from"] - 0.5, color="black", lw=0.8, ls=":",
                     label="chain distillation from here")
    axes.set(xlabel="cycle", title="Each member alone, and their mixture")
    zoom(axes, priors)


def zoom(axes, priors, others=()):
    """The first members are far above: leave them out of the frame, but keep the losses of `others` in."""
    losses = [m["val_loss"] for prior in priors for m in prior["members"]]
    low = min([*(g["val_loss"] for prior in priors for g in prior["growing"]), *others])
    high = max([np.percentile(losses, 80), *others])
    if len(losses) > 4:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def weights_by_member(figure, axes, priors):
    members = priors[0]["members"]
    grid = np.full((max(m["trajectory"] for m in members) + 1, max(m["cycle"] for m in members) + 1), np.nan)
    total = np.mean([np.bincount(chosen[-1], weights[-1], len(members)) for chosen, weights
                     in zip(pick(priors, "learned", "members"), pick(priors, "learned", "weights"))], axis=0)
    for m, weight in zip(members, total):
        grid[m["trajectory"], m["cycle"]] = weight
    image = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0)
    figure.colorbar(image, ax=axes, label="weight")
    axes.set_yticks(range(len(grid)))
    mean = ", mean over seeds" if len(priors) > 1 else ""
    axes.set(xlabel="cycle", ylabel="trajectory",
             title=f"Weights of the learned prior over all members{mean}")


def loss_against_epochs(axes, priors, beside):
    grown = [prior["growing"] for prior in priors]
    curve(axes, [g["epochs"] for g in grown[0]], [[g["val_loss"] for g in row] for row in grown],
          color="tab:blue", marker="o", label="this population, learned prior")
    for (label, others), marker in zip(beside.items(), itertools.cycle("s^Dv<>P*")):
        ends = [other["growing"][-1] for other in others]
        curve(axes, [ends[0]["epochs"]], [[end["val_loss"]] for end in ends],
              color="black", marker=marker, ls="", label=label)
    axes.set(xlabel="epochs of training, all trajectories together", title="What training buys")
    zoom(axes, priors, [other["growing"][-1]["val_loss"] for others in beside.values() for other in others])


def draw(priors, path, beside):
    """
    The figure of one population (bars: standard error of the difference to the best member, over validation
    documents), or of its repeats with other seeds (bars: their standard deviation). priors: contents of
    prior.json; beside: label -> those of other runs to compare with.
    """
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "text.parse_math": False})              # a file's name may have dollars
    figure = Figure(figsize=(11, 8), layout="constrained")              # no pyplot: no window, no backend
    (a, b), (c, d) = figure.subplots(2, 2)
    best, mixed = (np.mean([losses[-1] for losses in pick(priors, rule, "val_loss")])
                   for rule in ("best", "learned"))
    figure.suptitle(f"{len(priors[0]['members'])} members, their probabilities mixed: {mixed:.3f} nats per "
                    f"token; the best one alone: {best:.3f}")
    loss_against_K(a, priors)
    loss_against_cycle(b, priors)
    weights_by_member(figure, c, priors)
    loss_against_epochs(d, priors, beside)
    for axes in (a, b, d):
        axes.set_ylabel("validation loss, nats per token")
        axes.legend(frameon=False, fontsize=8)
    bars = "bars, first panel: standard error of the difference to the best member, over validation documents"
    if len(priors) > 1:
        bars = f"mean and standard deviation over {len(priors)} seeds"
    text = priors[0]["text"]
    name = Path(text.get("data", "FineWeb")).name.encode(errors="replace").decode()     # perhaps not in UTF-8
    figure.supxlabel(f"{bars}. Text: {name}, SHA-256 {text.get('text_sha256', 'unknown')[:16]}", fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, beside="")
    mine, beside = load_prior(config.run_dir), {}
    folders = list(filter(None, map(str.strip, options.beside.split(","))))
    short = len({Path(folder).name for folder in folders}) == len(folders)
    for folder in folders:
        other = load_prior(folder)
        beside[Path(folder).name if short else folder] = [other]
        if any(other["text"].get(k) != mine["text"].get(k)
               for k in ("text_sha256", "tokenizer", "val_tokens")):
            fail(f"beside={folder}: its losses are of another text, tokenizer or val_tokens; compare runs of "
                 "one data_dir")
    student = Path(student_of(config).run_dir)
    if (student / "prior.json").exists():
        [last] = load_prior(student)["growing"]         # its own epochs come on top of its teachers'
        epochs = last["epochs"] + mine["growing"][-1]["epochs"]
        beside["its student"] = [{"growing": [{**last, "epochs": epochs}]}]
    draw([mine], Path(config.run_dir) / "prior.png", beside)
    print(f"results are in {config.run_dir}: prior.json, prior.png, metrics.jsonl")


if __name__ == "__main__":
    main()
