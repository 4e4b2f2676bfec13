"""
What results/performance.md lacks, in one command on a machine with a GPU: python results/gpu.py [PART ...]
The checks of tests/on_gpu.py, a profile, and tools/bench.py's tables of configs/124m.py and configs/1p8b.py;
on several GPUs their exchange, too. --slowrun=FOLDER: a clone of the public repository, whose steps are timed
beside ours. Each part prints into results/gpu/DEVICE/PART.txt as it goes, so that one that is cut off leaves
what it had. Exits 1 where a part failed. Has not run yet; the 1p8b parts want 80 GB, at micro-batch 4 more.
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from infra.config import from_args              # noqa: E402
from infra.console import fail                  # noqa: E402
from infra.distributed import processes         # noqa: E402
from results.experiments import commit          # noqa: E402

SMALL = ["configs/124m.py", "--micro_batch=16"]
# so many tokens a rank has where 8 share a trajectory
LARGE = ["configs/1p8b.py", "--batch_tokens=65536", "--batch_tokens_ends=65536", "--rounds=3"]


def parts(slowrun, gpus):
    """name -> arguments of python; what is missed most comes first, what may take longest last."""
    bench = ["-m", "tools.bench"]
    found = {
        "124m": [*bench, *SMALL, "--steps=train,distill", *slowrun],
        "on_gpu": ["-m", "tests.on_gpu"],
        "1p8b": [*bench, *LARGE, "--steps=train,distill,score"],
        "1p8b_micro_batch_4": [*bench, *LARGE, "--steps=train", "--micro_batch=4"],
        "1p8b_profile": ["results/h200/profile_step.py"],
    }
    ranks = processes(from_args([str(ROOT / "configs" / "1p8b.py"), "--trajectories=1"], __doc__)[0], gpus)
    if ranks > 1:
        found[f"1p8b_on_{ranks}"] = [
            "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *bench,
            "configs/1p8b.py", "--trajectories=1", "--steps=train,distill"]
    found["1p8b_memory"] = [*bench, *LARGE, "--steps=prior", "--members=8", "--memory=1"]
    if slowrun:             # its 70 applications are one graph, which may compile for long
        found["1p8b_beside_theirs"] = [*bench, *LARGE, "--steps=train,distill", *slowrun]
        found["1p8b_memory_beside_theirs"] = [*found["1p8b_memory"], *slowrun]
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowrun", default="")
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        fail("results/gpu.py wants a GPU, and torch sees none here: run it where there is one")
    chosen = options.parts
    device, failed = torch.cuda.get_device_name(), []
    clone = [f"--slowrun={Path(options.slowrun).resolve()}"] * bool(options.slowrun)
    found = parts(clone, torch.cuda.device_count())
    if not set(chosen) <= found.keys():
        fail(f"results/gpu.py has the parts {', '.join(found)}, not {' '.join(chosen)}")
    folder = ROOT / "results" / "gpu" / device.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen or found:
        arguments, began = found[name], time.monotonic()
        with open(folder / f"{name}.txt", "w") as log:
            command = " ".join("--slowrun=FOLDER" if a in clone else a for a in arguments)
            print(f"python {command}, commit {commit()}, {device} x {torch.cuda.device_count()}, "
                  f"torch {torch.__version__}, Python {sys.version.split()[0]}\n", file=log, flush=True)
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})
        print(f"{name}: exit code {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] * (done.returncode != 0)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
