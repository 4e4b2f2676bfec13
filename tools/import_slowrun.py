"""
Members from the public Slowrun script's snapshots:
python -m tools.import_slowrun CONFIG --snapshots=FOLDER [--name=value ...]
FOLDER/model_{i}.pt, a dict of tensors in bf16 or fp32, becomes trajectory i // cycles, cycle i % cycles of
run_dir, which must have no members yet; then prior.py and the tools take them as its own. Nothing in FOLDER
is changed. The config must be that of the snapshots: shape, tokenizer, trajectories, cycles.
"""
import re
from pathlib import Path

import torch

from data import loader
from infra.config import from_args
from infra.console import fail, print0, script
from infra.distributed import join
from infra.run_directory import RunDirectory
from prior import load_weights, model_to_score


def snapshots(folder, expected):
    """Paths of model_0.pt, ..., of at most `expected`."""
    there = {int(m[1]): p for p in Path(folder).glob("model_*.pt")
             if (m := re.fullmatch(r"model_(0|[1-9]\d*)\.pt", p.name))}
    if not there or max(there) >= expected:
        found = f"model_{max(there)}.pt" if there else "no model_0.pt, model_1.pt, ..."
        fail(f"snapshots={folder} holds {found}; this config's trajectories x cycles are model_0.pt .. "
             f"model_{expected - 1}.pt: name their folder, and its trajectories and cycles")
    return there


def read(path):
    """name -> tensor; the prefixes of DDP and torch.compile go. Exits with code 2 where it is no snapshot."""
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as e:              # torch.load raises nearly anything on damaged bytes
        fail(f"'{path}' is not readable ({type(e).__name__}): fetch it again, or leave it out")
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point()
            for name, w in weights.items()):
        fail(f"'{path}' is no snapshot of the Slowrun script, a dict of bf16 or fp32 tensors: leave it out")
    own = {re.sub(r"\b(module|_orig_mod)\.", "", name): w for name, w in weights.items()}
    if len(own) < len(weights):
        fail(f"'{path}' holds a weight twice, with and without a prefix: fetch it again")
    return own


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, snapshots="")
    run, model = RunDirectory(config, loader.load(config).fingerprint), model_to_score(config)
    there = snapshots(options.snapshots, config.trajectories * config.cycles)
    if run.members():
        fail(f"run_dir={run.path} has members of its own: name another --run_dir for those of "
             f"{options.snapshots}")
    for path in there.values():                     # all of them, before the first is written
        load_weights(model, path, read(path))
    with run.open(join(config)):
        for i, path in sorted(there.items()):
            t, c = divmod(i, config.cycles)
            run.save_member(t, c, read(path), epochs=config.epochs_until(c + 1))
    print0(f"{len(there)} members are in {run.path}; next: prior.py with the same arguments")


if __name__ == "__main__":
    main()
