"""
Kills a population hundreds of times, in each phase of it: python -m tests.soak [KILLS] > results/soak.md
(240 by default: five to ten minutes on two cores; in the suite, test_survival.py has it do 20).
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
from data import loader, prepare
from infra.console import STOPPED
from infra.run_directory import RunDirectory
from results.experiments import commit
from tests.conftest import arguments, read

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


def small(folder):
    """Arguments of 3 members in 9 steps."""
    return arguments(folder, trajectories=1, cycles=3, distill_from=1, epochs_per_cycle=0.3, resume_every=2,
                     train_tokens=2200, fitness_tokens=300, val_tokens=400)


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


def work(run, rank, turns, patch):
    """
    In a forked process: the scripts, as run.sh calls them, each with its environment; patch(rank) changes the
    process first. Never returns.
    """
    code, script = 1, None
    try:
        sys.stdout = sys.stderr = open(run.log, "a", buffering=1)
        for number in (signal.SIGINT, signal.SIGHUP):           # ignored where the tests are under nohup
            signal.signal(number, signal.SIG_DFL)
        for marked in MARKED if rank == 0 else ():
            mark(*marked, lambda: script)
        # a forked process has no other threads to compute with: it would wait for them
        torch.set_num_threads = lambda n: None
        patch(rank)
        for script, environment, argv in turns:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            script.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


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


class Run:
    """
    A population by forked processes, in a folder; whole: what an uninterrupted one leaves. flags: settings of
    one start alone.
    """

    def __init__(self, argv, folder, whole=None):
        self.argv, self.folder, self.whole = [*argv, f"--run_dir={folder}"], folder, whole
        self.log = Path(f"{folder}.log")

    def start(self, *flags, size=1, patch=lambda rank: None, scripts=SCRIPTS):
        """The process ids of `size` ranks, whose output goes to the log."""
        turns, board[0] = [], 0
        for script in scripts:
            with socket.create_server(("127.0.0.1", 0)) as s:       # a free port for each
                environment = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=str(s.getsockname()[1]))
            turns.append((script, environment, [*self.argv, *flags]))
        return [os.fork() or work(self, rank, turns, patch) for rank in range(size)]

    def codes(self, *flags, **how):
        return finish(self.start(*flags, **how))

    def said(self):
        return self.log.read_text()

    def begin(self, phase, *flags, **how):
        """Its processes, the first of them in this phase."""
        children = self.start(*flags, **how)
        assert reaches(phase, children), self.said()
        return children

    def stop(self, phase, *flags, **how):
        """Asked to in this phase, by way of its last rank, all of them stop."""
        children = self.begin(phase, *flags, **how)
        os.kill(children[-1], signal.SIGTERM)
        assert finish(children) == [STOPPED] * len(children), self.said()

    def kill_in(self, phase, delay, **how):
        """
        SIGKILL to all ranks, `delay` seconds after rank 0 is first seen in this phase. The phase that met it,
        None where they ended well before.
        """
        children, met = self.start(**how), None
        if reaches(phase, children):
            time.sleep(delay)
            met = PHASES[board[0]]
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = finish(children)
        if set(codes) == {0}:
            return None
        assert met and set(codes) <= {0, -signal.SIGKILL}, codes            # 0: this rank had just ended
        return met

    def steps(self):
        """(trajectory, step) -> its last loss and gradient norm; a line that a kill tore is none."""
        steps = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):
                r = json.loads(line)
                steps[r["trajectory"], r["step"]] = r["loss"], r["grad_norm"]
        return steps

    def saved_last_step(self):
        """Whether the checkpoint of a run that was stopped is of the last step that was logged."""
        about = read(self.folder / "trajectory_00" / "resume.safetensors")[1]
        return (0, about["step"]) == max(self.steps())

    def left(self):
        """What must be equal: members, scores, prior.json, the losses; and what must not be there."""
        names = "trajectory_*/cycle_*", "scores/*/*", "prior.json"
        paths = [path for name in names for path in self.folder.glob(name)]
        found = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}
        return found | {"steps": self.steps(), "not removed": [*self.folder.rglob(".writing-*")]}

    def differs(self):
        """The names in which left() and whole differ."""
        found = self.left()
        return [name for name in {*self.whole, *found} if self.whole.get(name) != found.get(name)]

    def done(self, *flags, size=1, **how):
        """left() after the scripts have run to their end: whole, if that is known."""
        assert self.codes(*flags, size=size, **how) == [0] * size, self.said()
        assert not self.whole or self.differs() == []
        return self.left()


def soak(size, kills, folder):
    """(kills by phase, populations compared, names that differed) of populations on `size` ranks."""
    argv = [*small(folder), "--micro_batch=1"]
    run = Run(argv, folder / f"killed{size}", whole=Run(argv, folder / f"whole{size}").done(size=size))
    phases, compared, differ = collections.Counter(), 0, []
    wanted = [phase for phase in PHASES for _ in range(-(-kills // len(PHASES)))]
    RANDOM.shuffle(wanted)
    while wanted:
        # a phase that this start still comes to: one that it does not ends in a finished population
        phase = run.kill_in(wanted[-1], RANDOM.choice([0, 0.001, 0.003, 0.01]), size=size)
        if phase is not None:
            phases[phase] += 1
            if phase in wanted:
                wanted.remove(phase)
            print(f"{size} ranks: killed in '{phase}', {len(wanted)} to go", file=sys.stderr, flush=True)
            continue
        compared += 1
        differ += run.differs()
        shutil.rmtree(run.folder)
    assert run.codes(size=size) == [0] * size, run.said()
    return phases, compared + 1, differ + run.differs()


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, out = sys.stderr, sys.stdout            # what data.prepare says is not part of the report
        prepare.main(small(Path(folder)))
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
