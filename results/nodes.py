"""
The large configs' ranks, on one machine's CPU: python results/nodes.py [FOLDER]      (about 25 minutes on 2 cores, 16 GB)
Two trajectories on one node of 8 ranks, five on five nodes of 8 with a disk each, with a small model: train.py is asked to
stop and goes on, distill.py loses a rank and goes on, prior.py collects. Compares every step's loss and every answer with
those of one process, and writes results/nodes.md; fails where they differ by more than ALLOWED.
"""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args                            # noqa: E402
from files import read_json                             # noqa: E402
from results.demo import commit                         # noqa: E402
from results.rehearse import LOOPS, SMALL               # noqa: E402

# as SMALL, but batches of 32 sequences (24 at the ends) for 8 ranks to share, and no dropout, which ranks draw their own of
OWN = ["--n_embd=64", "--batch_tokens=4096", "--batch_tokens_ends=3072", "--micro_batch=1", "--dropout=0", "--cycles=4",
       "--epochs_per_cycle=1", "--distill_from=2", "--resume_every=2"]
FLAGS = list({flag.split("=")[0]: flag for flag in [*SMALL, *LOOPS, *OWN]}.values())        # the last of a name
SHAPES = {"1p8b": 1, "1p8b_960": 5}         # config -> nodes of 8 ranks
ALLOWED = 1e-4              # nats: other sums round otherwise, and rounding grows


def start(script, config, folder, nodes):
    """The launchers, torchrun's, of a script; nodes 0: one process. Each node has a run directory of its own."""
    env = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=8",
              "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29517", "--rdzv_id=q0"] if nodes else [sys.executable]
    launched = []
    for node in range(max(1, nodes)):
        run_dir = folder / f"node{node}"
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{script}_{node}.log", "ab") as log:
            launched.append(subprocess.Popen(
                [*launch, f"{script}.py", f"configs/{config}.py", *FLAGS, f"--data_dir={folder.parent / 'data'}",
                 f"--run_dir={run_dir}"], cwd=ROOT, env=env, stdout=log, stderr=log))
    return launched


def finish(launched, fails=False):
    codes = [process.wait() for process in launched]
    if any(codes) != fails:
        raise SystemExit(f"exit codes {codes} of {launched[0].args}")


def steps(folder):
    """(trajectory, step) -> loss, of all nodes; each step once."""
    whole = [path.read_text().rpartition("\n")[0] for path in folder.glob("node*/metrics.jsonl")]       # one may be writing
    lines = [json.loads(line) for text in whole for line in text.splitlines()]
    logged = [((r["trajectory"], r["step"]), r["loss"]) for r in lines if r["kind"] == "step"]
    assert len(dict(logged)) == len(logged), "a step is logged twice"
    return dict(logged)


def interrupted(launched, folder, awaited, interrupt):
    """Wait until these (trajectory, step) are logged, interrupt, and wait for all to end."""
    while not awaited <= steps(folder).keys():
        assert all(process.poll() is None for process in launched), launched[0].args
        time.sleep(0.2)
    interrupt()
    finish(launched, fails=True)


def kill_one(folder, nodes):
    """SIGKILL to one rank of the last node."""
    run_dir = f"--run_dir={folder / f'node{nodes - 1}'}"
    for process in Path("/proc").glob("[0-9]*"):
        words = (process / "cmdline").read_text().split("\0") if process.exists() else []
        if run_dir in words and "torch.distributed.run" not in words:
            return os.kill(int(process.name), signal.SIGKILL)


def population(config, folder, nodes):
    """All three scripts, interrupted where there are several ranks; (losses of all steps, the contents of prior.json)."""
    trajectories = from_args([f"configs/{config}.py"], "").trajectories
    if nodes:
        launched = start("train", config, folder, nodes)
        begun = {(t, 1) for t in range(trajectories)}
        interrupted(launched, folder, begun, lambda: [process.send_signal(signal.SIGTERM) for process in launched])
        said = re.findall(r"stopped after step (\d+) of trajectory (\d+), saved",
                          "".join(log.read_text(errors="replace") for log in folder.glob("train_*.log")))
        states = {(path.parent.name, path.name) for path in folder.glob("node*/trajectory_*/resume_*.pt")}
        assert said and {(f"trajectory_{int(t):02d}", f"resume_{int(step):08d}.pt") for step, t in said} <= states, said
    finish(start("train", config, folder, nodes))
    if nodes:
        launched = start("distill", config, folder, nodes)
        at = max(step for _, step in steps(folder)) + 2
        interrupted(launched, folder, {(trajectories - 1, at)}, lambda: kill_one(folder, nodes))
    for script in ("distill", "prior"):
        finish(start(script, config, folder, nodes))
    return steps(folder), read_json(folder / "node0" / "prior.json")


def main():
    top = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    subprocess.run([sys.executable, "-m", "data.prepare", "configs/1p8b.py", *FLAGS, f"--data_dir={top / 'data'}",
                    f"--run_dir={top / 'none'}"], cwd=ROOT, check=True)
    rows = []
    for config, nodes in SHAPES.items():
        (losses, prior), (alone, expected) = (population(config, top / f"{config}_{n}", n) for n in (nodes, 0))
        assert losses.keys() == alone.keys(), "other steps"
        differ = {key: abs(losses[key] - alone[key]) for key in alone}
        answers = [{(a["rule"], a["K"]): a["val_loss"] for a in p["answers"]} for p in (prior, expected)]
        assert answers[0].keys() == answers[1].keys(), "other answers"
        apart = [abs(answers[0][key] - answers[1][key]) for key in answers[1]]
        assert max(*differ.values(), *apart) < ALLOWED, (differ, apart)
        first = max(d for (_, step), d in differ.items() if step == 1)
        rows.append(f"| `configs/{config}.py` | {nodes} x 8 | {len(prior['members'])} | {len(alone)} "
                    f"| {first:.1e} | {max(differ.values()):.1e} | {max(apart):.1e} |")
        shutil.rmtree(top / f"{config}_{nodes}")
    text = f"""# The large configs' ranks, on one machine

Printed by `python results/nodes.py` at commit {commit()}: torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, all
nodes on this machine, each with a launcher and a run directory of its own. All with `{' '.join(FLAGS)}`.
`train.py` was asked to stop (SIGTERM to every node), saved the step it was at, and was started again; `distill.py` lost one rank of the
last node (SIGKILL) and was started again. The largest differences, in nats per token, to one process that trains the same population undisturbed:

| config | ranks | members | steps | loss of a first step | of any step | validation loss of any answer |
|---|---|---|---|---|---|---|
""" + "\n".join(rows) + "\n"
    (ROOT / "results" / "nodes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
