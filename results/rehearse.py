"""
Every large config through all three scripts, made small: python results/rehearse.py [FOLDER]
Its population, schedule and batches' ratio stay, with the model and text of configs/tiny.py, fewer cycles and shorter ones;
writes what each script printed to results/rehearsals.md. Says that the configs run, not what they would reach.
"""
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from results.demo import commit                                             # noqa: E402

SMALL = ["--data=manual", "--tokenizer=bytes", "--train_tokens=32768", "--fitness_tokens=16384", "--val_tokens=24576",
         "--epoch_multiple=8", "--n_layer=4", "--n_head=4", "--n_embd=128", "--sequence_len=128",
         "--batch_tokens=1024", "--micro_batch=2"]
ENDS, LOOPS = ["--batch_tokens_ends=768"], ["--loop_start=2", "--loop_end=4"]
CONFIGS = {
    "1p8b": [*ENDS, *LOOPS, "--cycles=10", "--epochs_per_cycle=0.25"],
    "1p8b_960": [*ENDS, *LOOPS, "--cycles=10", "--epochs_per_cycle=0.25"],
    "1p8b_smoke": [*ENDS, *LOOPS],
    "baseline": [*LOOPS, "--epochs_per_cycle=2", "--ema_every=1"],
    "124m": ["--epochs_per_cycle=1"],
    "1p8b --epochs=4": LOOPS,
    "1p8b --epochs=1": LOOPS,
}


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    lines = ["# The large configs, rehearsed small", "",
             f"Printed by `python results/rehearse.py` at commit {commit()}: torch {torch.__version__}, "
                 f"{os.cpu_count()} CPU cores ({platform.machine()}).",
             f"All with `{' '.join(SMALL)}`; two processes where there are trajectories for them.", ""]
    for name, flags in CONFIGS.items():
        config, *own = name.split()
        command = [f"configs/{config}.py", *own, *SMALL, *flags, f"--data_dir={folder / 'data'}",
                   f"--run_dir={folder / name.replace(' ', '_')}"]
        done = subprocess.run([str(ROOT / "run.sh"), *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        lines += [f"## `configs/{config}.py {' '.join([*own, *flags])}`", "",
                  "```", done.stdout.replace(str(folder), "FOLDER").strip(), "```", ""]
    (ROOT / "results" / "rehearsals.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
