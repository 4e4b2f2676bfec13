"""
What tools.export says in the README.md of an exported folder, its model card: model_card.md, filled in.
"""
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from infra.console import ROOT, Damaged
from infra.files import read_json, read_tensors
from prior import paired_error

PUT = "the tokenizer in this folder puts it in front", "put it in front of the ids"
TEXT = """\
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
IDS = "print(model.generate(max_new_tokens=40, do_sample=False))        # ids, from the separator on"


def commit():
    """Of this repository, marked as dirty where files differ from it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return "unknown"
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def trained_on(run):
    path = run.folder(0) / "resume.safetensors"
    try:
        about = read_tensors(path, "a checkpoint", check=False)[1]["environment"]
    except Damaged:                         # imported members come without a checkpoint
        return "unknown"
    return f"{about['machine']}; torch {about['torch']}; ranks of a trajectory: {about['ranks']}"


def facts(run, population, prior):
    """Of the card: name -> text. run: the model's, a student's or the population's, which prior is of."""
    c, text, about = population.config, prior["text"], read_json(run.config_path)
    names = ", ".join(Path(name).name for name in text.get("data", c.data).split(","))  # without folders
    trajectories = sorted({m["trajectory"] for m in prior["members"]})
    shape = f"{len(trajectories)} trajectories x {c.cycles} cycles x {c.epochs_per_cycle:g} epochs"
    if c.first_cycle_epochs:
        shape += f", of the first cycle {c.first_cycle_epochs:g}"
    if "taught_by" in about:
        shape += (f"; its student, on from the best member: {run.config.epochs_per_cycle:g} epochs, "
                  f"teachers: {len(about['taught_by']['teachers'])}, alpha={run.config.distill_alpha:g}")
    return {
        "text": f"{names}, as {c.tokenizer}: {c.train_tokens:,} tokens, of which {c.fitness_tokens:,} are "
                f"the fitness set, and {c.val_tokens:,} for validation",
        "SHA-256 of the text": text.get("text_sha256", "unknown"),
        "SHA-256 of its tokens": run.identity["data_fingerprint"],
        "population": shape,
        "seeds": ", ".join(str(c.seed + t) for t in trajectories),
        "trained on": trained_on(run),
        "code": f"{about['code']} (SHA-256 of the method's files); exported by commit {commit()}"}


def error_beside(own, best, documents):
    """
    Standard error of the difference in validation loss of two models, (run, its row in prior.json), over the
    documents (tokens,) of data.loader; None where the scores of one are missing.
    """
    scores = [run.load_scores("val", m["trajectory"], m["cycle"]) for run, m in (own, best)]
    if [sha256 for _, sha256 in scores] != [m["weights_sha256"] for _, m in (own, best)]:
        return None
    mine, others = (log_p.astype(np.float64) for log_p, _ in scores)
    difference = torch.from_numpy(np.bincount(documents, others - mine))
    return paired_error(difference, torch.from_numpy(np.bincount(documents)).double())


def card(run, prior, chosen, losses, rows, ids):
    """
    README.md. chosen: (trajectory, cycle) -> weight; losses: name -> as prior.json has them; rows: facts();
    ids: without a tokenizer.
    """
    of, passes = {(m["trajectory"], m["cycle"]): m for m in prior["members"]}, len(chosen)
    title, what = "One model", f"One member of a population of {len(of)}."
    if "taught_by" in read_json(run.config_path):
        title, what = "A student", "One model, which the members of a population have taught."
    if passes > 1:
        title = f"A mixture of {passes} models"
        what = (f"The weighted mean of the next-token probabilities of {passes} members of a population of "
                f"{len(of)}: every token costs {passes} forward passes.")

    def line(name, a):
        error = f"{a['val_error']:.4f}" if a["val_error"] else "-"      # the best member has none to itself
        return (f"| {name} | {a['fit_loss']:.4f} | {a['val_loss']:.4f} | {error} | "
                f"{a['val_perplexity']:.3f} | {a['val_bits_per_byte']:.4f} |")
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        title=title, what=what, usage=IDS if ids else TEXT, sequence_len=run.config.sequence_len,
        separator=run.config.vocab_size - 1, put=PUT[ids],
        facts="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        losses="\n".join(line(*of) for of in losses.items()),
        members="\n".join(f"| {t} | {c} | {w} | {of[t, c]['weights_sha256']} |"
                          for (t, c), w in chosen.items()))
