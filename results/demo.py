"""
The demo's figures: python results/demo.py [FOLDER]     (about 25 minutes on 2 cores; FOLDER holds the runs, default runs/demo)
Runs, for three seeds, configs/tiny.py, the same without the chain, and configs/single.py at 8, 16 and 32 epochs, each by
./run.sh; writes results/demo.md and results/demo.png. Nothing here was tuned on the validation text that it reports.
"""
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files import read_json                             # noqa: E402
from tools.plot import draw                             # noqa: E402

SEEDS = (42, 1042, 2042)
VARIANTS = {
    "tiny": ("configs/tiny.py", []), "no_chain": ("configs/tiny.py", ["--distill_from=16"]),
    **{f"single_{e}": ("configs/single.py", [f"--epochs_per_cycle={e}"]) for e in (8, 16, 32)},
}


def run(out, config, flags, seed):
    """prior.json of one variant and seed, in run_dir `out`; what is there already is not trained again."""
    subprocess.run([str(ROOT / "run.sh"), config, *flags, f"--seed={seed}", f"--run_dir={out}"], cwd=ROOT, check=True)
    return read_json(out / "prior.json")


def commit():
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def loss_of(prior, rule, K=None):
    return next(a["val_loss"] for a in reversed(prior["answers"]) if a["rule"] == rule and K in (None, a["K"]))


def row(label, epochs, K, losses):
    sd = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-"
    return f"| {label} | {epochs} | {K} | {np.mean(losses):.4f} | {sd} | {', '.join(f'{x:.4f}' for x in losses)} |"


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "demo")
    priors = {name: [run(folder / f"{name}_{seed}", config, flags, seed) for seed in SEEDS]
              for name, (config, flags) in VARIANTS.items()}
    lines = ["| answer | epochs in all | K | mean | sd | seeds " + ", ".join(map(str, SEEDS)) + " |",
             "|---|---|---|---|---|---|"]
    for e in (8, 16, 32):
        lines.append(row(f"one model, one cosine over {e} epochs", e, 1, [loss_of(p, "best") for p in priors[f"single_{e}"]]))
    for name, label in (("tiny", "2 x 16 cycles"), ("no_chain", "2 x 16 cycles without the chain")):
        lines.append(row(f"{label}: best member", 64, 1, [loss_of(p, "best") for p in priors[name]]))
        for rule, words in (("uniform", "K lowest losses, equal weights"), ("topk", "K largest weights (the paper's)"),
                            ("learned", "learned prior")):
            for K in (1, 2, 4, 8, 16, 32):
                lines.append(row(f"{label}: {words}", 64, K, [loss_of(p, rule, K) for p in priors[name]]))
        lines.append(row(f"{label}: learned prior after 8 cycles", 32, 16, [p["growing"][7]["val_loss"] for p in priors[name]]))
    text = priors["tiny"][0]["text"]
    head = f"""# The demo, measured

Printed by `python results/demo.py` at commit {commit()}: Python {text['python']}, torch {torch.__version__}, {os.cpu_count()} CPU cores
({platform.machine()}), one thread for each of two trajectories, two threads for a single model.
The Python manual of that Python, SHA-256 of the text {text['text_sha256']}.
Validation loss in nats per token (a token is a byte), mean and standard deviation over the seeds {', '.join(map(str, SEEDS))};
members and weights are chosen on the fitness set alone. Nothing was tuned here: rates, sizes and lengths were
fixed before the first run.

"""
    (ROOT / "results" / "demo.md").write_text(head + "\n".join(lines) + "\n\n![the population, over the seeds](demo.png)\n")
    draw(priors["tiny"], ROOT / "results" / "demo.png",
         {"2 x 16 cycles without the chain": priors["no_chain"],
          **{f"one model, one cosine over {e} epochs": priors[f"single_{e}"] for e in (8, 16, 32)}})
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main()
