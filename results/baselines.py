"""
Baselines and small budgets on the demo's text: python results/baselines.py [FOLDER]
Independent models (the paper's baseline), and how to spend 1, 4, 8 (three seeds) and 256 epochs (one seed, ten minutes
each), each by ./run.sh; writes results/baselines.md. No choice was made on the validation text that it reports.
"""
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args                                                # noqa: E402
from data import loader                                                     # noqa: E402
from population import Run                                                  # noqa: E402
from prior import mixture_losses                                            # noqa: E402
from results.demo import commit, loss_of, row, run                          # noqa: E402

TINY, SEEDS = "configs/tiny.py", (42, 1042, 2042)
INDEPENDENT = ["--cycles=1", "--schedule=cosine", "--distill_from=1", "--ema_decay=0.95", "--ema_every=1"]
VARIANTS = {                # name: (label, epochs, flags)
    "independent_8x32": ("8 independent models of 32 epochs", 256, [*INDEPENDENT, "--trajectories=8", "--epochs_per_cycle=32"]),
    "q0_256": ("q0, --epochs=256: 2 x 64 cycles", 256, ["--epochs=256"]),
    "e1": ("--epochs=1: four snapshots on the last 0.15 epoch", 1, ["--epochs=1"]),
    "e4": ("--epochs=4: four snapshots on the last epoch", 4, ["--epochs=4"]),
    "e4_cycles": ("2 cycles of 2 epochs", 4, ["--trajectories=1", "--cycles=2"]),
    "e4_2x2": ("2 independent models of 2 epochs", 4, [*INDEPENDENT, "--trajectories=2", "--epochs_per_cycle=2"]),
    "e4_4x1": ("4 independent models of 1 epoch (no EMA)", 4,
               [*INDEPENDENT, "--ema_decay=0", "--trajectories=4", "--epochs_per_cycle=1"]),
    "e8": ("--epochs=8: 4 cycles of 2 epochs", 8, ["--epochs=8"]),
    "e8_snapshots": ("four snapshots on the last of 8 epochs, one decay", 8,
                     ["--trajectories=1", "--cycles=4", "--first_cycle_epochs=7.25", "--epochs_per_cycle=0.25",
                      "--restart=none"]),
}


def uniform_over_first(folder, flags, seed, counts):
    """Validation loss of equal weights over the first n trajectories, for each n: what a smaller budget would have given."""
    config = from_args([str(ROOT / TINY), *flags, f"--seed={seed}", f"--run_dir={folder}",
                        f"--data_dir={ROOT / 'data/manual'}"], "")
    data = loader.load(config)
    population = Run(config, data.fingerprint)
    log_p = [population.read_scores("val", *m, data.val[:, 1:].size)[0] for m in population.members()]
    mixtures = [(torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64)) for n in counts]
    nats, _ = mixture_losses(mixtures, log_p, data.token_bytes[data.val[:, 1:].ravel()], data.val_documents)
    return (nats.sum(dim=1) / len(log_p[0])).tolist()


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "baselines")
    lines = ["| | epochs in all | K | mean | sd | seeds " + ", ".join(map(str, SEEDS)) + ", or the first |",
             "|---|---|---|---|---|---|"]
    priors = {}
    for name, (label, epochs, flags) in VARIANTS.items():
        seeds = SEEDS if epochs < 256 else SEEDS[:1]
        priors[name] = [run(folder / f"{name}_{seed}", TINY, flags, seed) for seed in seeds]
        members = len(priors[name][0]["members"])
        lines.append(row(f"{label}: best member", epochs, 1, [loss_of(p, "best") for p in priors[name]]))
        lines.append(row(f"{label}: equal weights", epochs, members, [loss_of(p, "uniform", members) for p in priors[name]]))
        lines.append(row(f"{label}: learned prior", epochs, members, [loss_of(p, "learned", members) for p in priors[name]]))
        if name.startswith("independent"):
            counts = [members // 4, members // 2]
            for n, losses in zip(counts, np.transpose(
                    [uniform_over_first(folder / f"{name}_{seed}", flags, seed, counts) for seed in seeds])):
                lines.append(row(f"the first {n} of them: equal weights", epochs * n // members, n, losses))
        if name == "q0_256":
            for cycle in (15, 31):
                at = [next(g for g in p["growing"] if g["cycle"] == cycle) for p in priors[name]]
                lines.append(row(f"its first {cycle + 1} cycles: learned prior", round(at[0]["epochs"]), at[0]["members"],
                                 [g["val_loss"] for g in at]))
    text = priors["e1"][0]["text"]
    head = f"""# Baselines and small budgets, on the demo's text

Printed by `python results/baselines.py` at commit {commit()}: Python {text['python']}, torch {torch.__version__}, {os.cpu_count()} CPU cores
({platform.machine()}), one thread for each of two processes, two threads where there is one trajectory.
The model, data and rates of configs/tiny.py (no looped layers); text of SHA-256 {text['text_sha256'][:16]}.
Validation loss in nats per token (a token is a byte), mean and standard deviation over the seeds (256 epochs: one seed, trained by earlier
commits of the same day, whose arithmetic differs in rounding only). Independent models: one cosine
each, constant decay, no chain, an EMA (0.95, every step) over the last tenth where that has two steps.

"""
    (ROOT / "results" / "baselines.md").write_text(head + "\n".join(lines) + "\n")
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main()
