"""
Members from the public Slowrun script's snapshots: python -m tools.import_slowrun CONFIG --snapshots=FOLDER [--name=value ...]
FOLDER/model_{i}.pt, a dict of tensors in bf16 or fp32, becomes trajectory i // cycles, cycle i % cycles of run_dir, which must
have no members yet; then prior.py and the tools take them as its own. Nothing in FOLDER is changed. The config must be that
of the snapshots: shape, tokenizer, trajectories, cycles.
"""
import re
from pathlib import Path

from config import from_args
from data import loader
from errors import refuse
from files import Damaged, dense, load
from population import Run
from prior import fill, model_to_score
from world import join_world


def snapshots(folder, expected):
    """Paths of model_0.pt, ..., of at most `expected`."""
    there = {int(m[1]): p for p in Path(folder).glob("model_*.pt") if (m := re.fullmatch(r"model_(0|[1-9]\d*)\.pt", p.name))}
    if not there or max(there) >= expected:
        refuse(f"snapshots={folder} holds {f'model_{max(there)}.pt' if there else 'no model_0.pt, model_1.pt, ...'}; this config's "
               f"trajectories x cycles are model_0.pt .. model_{expected - 1}.pt: name their folder, and its trajectories and cycles")
    return there


def read(path):
    """name -> tensor; the prefixes of DDP and torch.compile go. Exits with code 2 where it is no snapshot."""
    try:
        weights = load(path)
    except Damaged as e:
        refuse(f"{path} {e}: fetch it again, or leave it out")
    if not isinstance(weights, dict) or not all(isinstance(n, str) and dense(w) and w.is_floating_point()
                                                for n, w in weights.items()):
        refuse(f"{path} is no snapshot of the Slowrun script, a dict of bf16 or fp32 tensors: leave it out")
    own = {re.sub(r"\b(module|_orig_mod)\.", "", name): w for name, w in weights.items()}
    return own if len(own) == len(weights) else refuse(f"{path} holds a weight twice, with and without a prefix: fetch it again")


def main(argv=None):
    config, options = from_args(argv, __doc__, snapshots="")
    run, model = Run(config, loader.load(config).fingerprint), model_to_score(config)
    there = snapshots(options.snapshots, config.trajectories * config.cycles)
    if run.members():
        refuse(f"run_dir={run.path} has members of its own: name another --run_dir for those of {options.snapshots}")
    for path in there.values():                     # all of them, before the first is written
        fill(model, path, read(path))
    run.check_room(sum(p.numel() for p in model.parameters()))
    with run:
        run.claim(join_world(config), leftovers=("trajectory_*/.*",))
        for i, path in sorted(there.items()):
            t, c = divmod(i, config.cycles)
            run.save_member(t, c, read(path), epochs=config.epochs_until(c + 1))
    print(f"{len(there)} members are in {run.path}; next: prior.py with the same arguments")


if __name__ == "__main__":
    main()
