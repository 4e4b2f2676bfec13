"""
Kills a population hundreds of times, in each phase of it: python -m tests.soak [KILLS] > results/soak.md
(240 by default: five to ten minutes on two cores; in the suite, tests/test_survival.py has it do 20).
Each kill is a SIGKILL to every process, at a random moment of a chosen phase; then the scripts are started
again. Whenever a population is done, its members, scores, prior.json and logged steps are compared with those
of an uninterrupted one, byte by byte, and the next is begun.
"""
import collections
import contextlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo         # DDP imports it, for seconds: here once, not in every forked rank

import distill
import prior
import train
from data import loader
from data import prepare as data_prepare
from infra.run_directory import RunDirectory
from results.experiments import commit
from tests.conftest import MICRO, ROOT, read

SCRIPTS = (train, distill, prior)
# what rank 0 of the forked processes is in, on the board: an index into PHASES
MARKED = ((train, "train_step", "training step"), (loader, "score", "fitness loss"),
          (RunDirectory, "save_member", "member saved"), (RunDirectory, "save_checkpoint", "state saved"),
          (RunDirectory, "save_scores", "scores saved"), (prior, "answers_for", "fit"),
          (prior, "write_json", "prior.json saved"))
# the same functions under another script are another phase
UNDER = {(distill, "training step"): "distillation step", (prior, "fitness loss"): "scoring"}
PHASES = ("between", *(phase for *_, phase in MARKED), *UNDER.values())
LINGER = 0.001              # seconds before and after each marked function: some are too short to be met
RANDOM = random.Random(0)
board = mmap.mmap(-1, 1)


def arguments(folder):
    """Of 3 members in 9 steps, with data in folder/data: text that is the same under every Python."""
    values = {**MICRO, "trajectories": 1, "cycles": 3, "distill_from": 1, "epochs_per_cycle": 0.3,
              "resume_every": 2, "train_tokens": 1700, "fitness_tokens": 300, "val_tokens": 400,
              "data": folder / "words.txt", "data_dir": folder / "data", "run_dir": folder / "run"}
    return [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in values.items())]


def prepare(folder):
    torch.set_num_threads(1)
    words, draw = "to be or not that is the question".split(), random.Random(0).choices
    (folder / "words.txt").write_text("\n".join(" ".join(draw(words, k=20)) for _ in range(60)))
    data_prepare.main(arguments(folder))


def mark(owner, name, phase, script):
    """Have a function show its phase on the board while it runs; script(): the one that is running."""
    function = getattr(owner, name)
    def marked(*args, **kwargs):
        before, board[0] = board[0], PHASES.index(UNDER.get((script(), phase), phase))
        try:
            time.sleep(LINGER)
            result = function(*args, **kwargs)
            time.sleep(LINGER)
            return result
        finally:
            board[0] = before
    setattr(owner, name, marked)


def before(owner, name, do):
    """Have do(*args) come before every call of owner.name(*args)."""
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        do(*args, **kwargs)
        return function(*args, **kwargs)
    setattr(owner, name, wrapped)


def work(argv, log, rank, turns, patch):
    """
    In a forked process: the scripts, as run.sh calls them, each with its environment; patch(rank) changes the
    process first. Never returns.
    """
    code, script = 1, None
    try:
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        for number in (signal.SIGINT, signal.SIGHUP):           # ignored where the tests are under nohup
            signal.signal(number, signal.SIG_DFL)
        for marked in MARKED if rank == 0 else ():
            mark(*marked, lambda: script)
        # a forked process has no other threads to compute with: it would wait for them
        torch.set_num_threads = lambda n: None
        patch(rank)
        for script, environment in turns:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            script.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(argv, log, size=1, patch=lambda rank: None, scripts=SCRIPTS):
    """The process ids of `size` forked ranks, whose output goes to the log."""
    turns, board[0] = [], 0
    for script in scripts:
        with socket.create_server(("127.0.0.1", 0)) as s:           # a free port for each
            turns.append((script, dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                                       MASTER_PORT=str(s.getsockname()[1]))))
    return [os.fork() or work(argv, log, rank, turns, patch) for rank in range(size)]


def finish(children, seconds=120):
    """Wait for their exit codes (negative: the signal); as torchrun, end the others once one has failed."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < until:
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                if status:
                    until = min(until, time.monotonic() + 2)
        time.sleep(0.002)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child, "killed") for child in children]


def reaches(phase, children):
    """Wait until rank 0 is in this phase; False where it ends before."""
    while board[0] != PHASES.index(phase):
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    return True


def kill_in(phase, children, delay):
    """
    SIGKILL to all ranks, `delay` seconds after rank 0 is first seen in this phase. The phase that met it,
    None where they ended well before.
    """
    met = None
    if reaches(phase, children):
        time.sleep(delay)
        met = PHASES[board[0]]
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = finish(children)
    if set(codes) == {0}:
        return None
    assert met and set(codes) <= {0, -signal.SIGKILL}, codes          # 0: this rank had just ended
    return met


def logged(folder):
    """The lines of metrics.jsonl; one that a kill tore is none."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def left(folder):
    """What must be equal: bytes of members, scores, prior.json, by name; each step's last loss and norm."""
    paths = [*folder.glob("trajectory_*/cycle_*"), *folder.glob("scores/*/*"), *folder.glob("prior.json")]
    steps = {(r["trajectory"], r["step"]): (r["loss"], r["grad_norm"])
             for r in logged(folder) if r["kind"] == "step"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths} | {"steps": steps}


def difference(reference, folder):
    """The names in which a finished run differs from the uninterrupted one; temporary files count."""
    found, debris = left(folder), [p for p in folder.rglob(".*") if p.name != ".lock"]
    return [name for name in {*reference, *found} if reference.get(name) != found.get(name)] + debris


def uninterrupted(argv, folder, size=1):
    codes = finish(start([*argv, f"--run_dir={folder}"], folder.parent / "log", size))
    assert codes == [0] * size, (folder.parent / "log").read_text()[-3000:]
    return left(folder)


def saved_last_step(folder):
    """Whether the checkpoint of a run that was stopped is of the last step that was logged."""
    step = read(folder / "trajectory_00" / "resume.safetensors")[1]["step"]
    return step == max(r["step"] for r in logged(folder) if r["kind"] == "step")


def soak(size, kills, folder):
    """(kills by phase, populations compared, names that differed) of populations on `size` ranks."""
    argv, log = [*arguments(folder), "--micro_batch=1"], folder / f"log{size}"
    whole, population = uninterrupted(argv, folder / f"whole{size}", size), folder / f"killed{size}"
    argv, phases, compared, differ = [*argv, f"--run_dir={population}"], collections.Counter(), 0, []
    wanted = [phase for phase in PHASES for _ in range(-(-kills // len(PHASES)))]
    RANDOM.shuffle(wanted)
    while wanted:
        children, delay = start(argv, log, size), RANDOM.choice([0, 0.001, 0.003, 0.01])
        # a phase that this start still comes to: one that it does not ends in a finished population
        phase = kill_in(wanted[-1], children, delay)
        if phase is not None:
            phases[phase] += 1
            if phase in wanted:
                wanted.remove(phase)
            print(f"{size} ranks: killed in '{phase}', {len(wanted)} to go", file=sys.stderr, flush=True)
            continue
        compared += 1
        differ += difference(whole, population)
        shutil.rmtree(population)
    assert finish(start(argv, log, size)) == [0] * size, log.read_text()[-3000:]
    return phases, compared + 1, differ + difference(whole, population)


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, out = sys.stderr, sys.stdout            # what data.prepare says is not part of the report
        prepare(Path(folder))
        one, two = (soak(size, kills // 2, Path(folder)) for size in (1, 2))
        sys.stdout = out
    print(f"# Killed, and started again\n\nPrinted by `python -m tests.soak {kills}` at commit {commit()}; "
          f"torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}).\n{__doc__}\n"
          "| phase of rank 0 | kills, 1 process | kills, 2 processes |\n|---|---|---|")
    rows = [(phase, one[0][phase], two[0][phase]) for phase in PHASES]
    rows += [("all", one[0].total(), two[0].total()), ("populations finished and compared", one[1], two[1]),
             ("files that differed or were left over", len(one[2]), len(two[2]))]
    for row in rows:
        print("| {} | {} | {} |".format(*row))
    for name in one[2] + two[2]:
        print(f"\n{name}")


if __name__ == "__main__":
    main()
