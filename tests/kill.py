"""
Runs the three scripts in forked processes, kills them, starts them again and compares what they leave with an
uninterrupted run: the machinery of tests/test_survival.py (20 kills) and tests/soak.py (hundreds).
"""
import contextlib
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback

import torch
import torch._dynamo         # DDP imports it, for seconds: here once, not in every forked rank

import distill
import prior
import train
from infra.config import from_args
from data import loader
from infra.run_directory import RunDirectory
from tests.conftest import MICRO, ROOT

SCRIPTS = (train, distill, prior)
PHASES = ("between", "training step", "distillation step", "fitness loss", "member saved", "state saved", "scoring",
          "scores saved", "fit", "prior.json saved")
WRITERS = []
LINGER = 0.001                      # seconds before and after each marked function: some are too short to be met
RANDOM = random.Random(0)
board = mmap.mmap(-1, 1)            # what rank 0 of the forked processes is in: an index into PHASES


def arguments(folder, **overrides):
    """
    Of a population of 3 members in 9 steps, whose data stands in folder/data, of text that is the same under every Python.
    """
    values = {**MICRO, "trajectories": 1, "cycles": 3, "distill_from": 1, "epochs_per_cycle": 0.3, "resume_every": 2,
              "train_tokens": 1700, "fitness_tokens": 300, "val_tokens": 400, "data": folder / "words.txt",
              "data_dir": folder / "data", "run_dir": folder / "run", **overrides}
    return [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in values.items())]


def mark(owner, name, phase):
    """Have a function show its phase on the board while it runs."""
    function = getattr(owner, name)
    def marked(*args, **kwargs):
        before, board[0] = board[0], PHASES.index(phase)
        try:
            time.sleep(LINGER)
            result = function(*args, **kwargs)
            time.sleep(LINGER)
            return result
        finally:
            board[0] = before
    setattr(owner, name, marked)


def work(argv, output, rank, size, ports, patch, scripts):
    """In a forked process: the scripts, as run.sh calls them; patch(rank) changes the process first. Never returns."""
    code = 1
    try:
        sys.stdout = sys.stderr = open(output, "w", buffering=1)
        if rank == 0:
            mark(loader, "score", "fitness loss")
            mark(RunDirectory, "save_member", "member saved")
            mark(RunDirectory, "save_checkpoint", "state saved")
            mark(RunDirectory, "save_scores", "scores saved")
            mark(prior, "answers_for", "fit")
            mark(prior, "write_json", "prior.json saved")
        # a forked process has no other threads to compute with: it would wait for them
        torch.set_num_threads = lambda n: None
        patch(rank)
        step, score = train.train_step, loader.score
        for script, port in zip(scripts, ports):
            if size > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == 0:
                train.train_step, loader.score = step, score
                mark(train, "train_step", "distillation step" if script is distill else "training step")
                if script is prior:
                    mark(loader, "score", "scoring")
            script.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else print(e.code) or 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def start(argv, log, size=1, patch=lambda rank: None, scripts=SCRIPTS):
    """
    The process ids of `size` forked ranks. What they print goes to the log, through a pipe: a limit on files is not on it.
    """
    board[0], ports, children = 0, free_ports(len(scripts)) if size > 1 else range(len(scripts)), []
    with open(log, "ab") as f:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=f)
    for rank in range(size):
        children.append(os.fork() or work(argv, writer.stdin.fileno(), rank, size, ports, patch, scripts))
    writer.stdin.close()
    WRITERS.append(writer)
    return children


def ended(child):
    """Its exit code (negative: the signal), None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def finish(children, seconds=120):
    """Wait for their exit codes; as torchrun, end the others once one has failed."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in codes and (code := ended(child)) is not None:
                codes[child] = code
                if code != 0:
                    until = min(until, time.monotonic() + 2)
        time.sleep(0.002)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for writer in WRITERS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(1)                  # a stopped rank may still hold its end
    return [codes.get(child, "killed") for child in children]


def kill_when(children, moment):
    """
    SIGKILL to all ranks at a moment (a function that waits, and returns False where it has passed). The phase, None where
    they ended well before.
    """
    phase = None
    if moment():
        phase = PHASES[board[0]]
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = finish(children)
    if set(codes) == {0}:
        return None
    assert phase and set(codes) <= {0, -signal.SIGKILL}, codes        # 0: this rank had just ended
    return phase


def left(folder):
    """What must be equal: bytes by name of members, scores and prior.json; and every step's loss, as its last line has it."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
             if p.suffix == ".json" and p.name != "config.json"
             or p.suffix == ".safetensors" and (p.name.startswith("cycle_") or "scores" in p.parts)}
    steps = {(r["trajectory"], r["step"]): (r["loss"], r["grad_norm"]) for r in logged(folder) if r["kind"] == "step"}
    return files | {"steps": sorted((*step, *values) for step, values in steps.items())}


def logged(folder):
    """The lines of metrics.jsonl; one that a kill tore is none."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def debris(folder):
    """Temporary files."""
    return [p for p in folder.rglob(".*") if p.name != ".lock"]


def difference(reference, folder):
    """The names in which a finished run differs from the uninterrupted one; temporary files count."""
    found = left(folder)
    return [name for name in {*reference, *found} if reference.get(name) != found.get(name)] + debris(folder)


def uninterrupted(argv, folder, size=1):
    codes = finish(start([*argv, f"--run_dir={folder}"], folder.parent / "log", size))
    assert codes == [0] * size, (folder.parent / "log").read_text()[-3000:]
    return left(folder)


def prepare(folder):
    torch.set_num_threads(1)
    from data import prepare as script
    word = random.Random(0)
    (folder / "words.txt").write_text("\n".join(
        " ".join(word.choice(("to", "be", "or", "not", "that", "is", "the", "question")) for _ in range(20))
        for _ in range(60)))
    script.main(arguments(folder))
    return from_args(arguments(folder), "")[0]


def within(phase, children, delay):
    """A moment: `delay` seconds after rank 0 is first seen in this phase; passed where it ends before."""
    def moment():
        while board[0] != PHASES.index(phase):
            if (code := os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and code:
                return False
            time.sleep(0.0005)
        time.sleep(delay)
        return True
    return moment

