"""
The run directory in which the scripts meet: members (bf16 weights and what they are), resume states, scores and metrics.
Nothing here knows the model or the data.

`python -m population CONFIG [--name=value ...]` checks a config and its run directory, and prints how many processes
run.sh starts for it.
"""
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from config import FIELDS, from_args
from errors import refuse
from files import (Damaged, differences, load_tensors, read_json, save_tensors, sweep, write_json)
from world import processes


def code_version():
    """SHA-256, shortened, of the Python files of the method: an edited copy is another version."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("data/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def setup(config, world):
    """What the bits of a run depend on, beside its identity."""
    machine = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else
               f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    return dict(machine=machine, device=world.device.type, torch=torch.__version__.split("+")[0], ranks=world.data_size,
                micro_batch=config.micro_batch, threads=torch.get_num_threads())


DEFAULTS = {f.name: f.default for f in FIELDS.values() if f.default is not dataclasses.MISSING and not f.metadata.get("free")}
SPLITS = "fit", "val"   # the held-out sets: for the prior, and to report
LAG = 120               # seconds until another machine sees what was written on a shared disk

State = namedtuple("State", "tensors about")        # to go on from: name -> tensor on disk, and plain values


class Run:
    """
    The run directory of a config. Exits with code 2 where it belongs to another config or other data (data_fingerprint
    None: any will do), or cannot be written. Nothing is written before it is locked; locks are held until the end of a
    `with`. t and c are trajectory and cycle.
    """

    def __init__(self, config, data_fingerprint):
        self.config, self.path, self.locks = config, Path(config.run_dir), []       # open files whose locks are held
        # through JSON and back, so that what is compared is what a file can hold
        self.identity = json.loads(json.dumps({**config.identity(), "data_fingerprint": data_fingerprint}))
        self.config_path = self.path / "config.json"
        if self.config_path.exists():
            theirs = read_json(self.config_path).get("identity")
            if data_fingerprint is None and isinstance(theirs, dict):
                self.identity["data_fingerprint"] = theirs.get("data_fingerprint")
            differ = self.differs(theirs)
            if differ:
                refuse(f"run_dir={self.path} belongs to another config: {differ}; name another --run_dir, or move it away")
        self.there = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        try:
            tempfile.TemporaryFile(dir=self.there).close()
        except OSError as e:
            refuse(f"run_dir={self.path}: cannot write there: {e.strerror}; name another --run_dir")

    def identity_of(self, t):
        """Of trajectory t's files, with its own seed: trajectory 0 of seed 43 may be copied into a run of seed 42 as its 1."""
        return {**self.identity, "seed": self.config.seed + t}

    def differs(self, identity, t=0):
        """How a file's identity differs from ours, as text; settings that older code did not have count as today's defaults."""
        return differences({**DEFAULTS, **identity} if isinstance(identity, dict) else identity, self.identity_of(t))

    # ---- members

    def folder(self, t):
        return self.path / f"trajectory_{t:02d}"

    def member_path(self, t, c):
        return self.folder(t) / f"cycle_{c:03d}.pt"

    def members(self):
        """The (t, c) of every member that is there, in order."""
        return [(t, c) for t in range(self.config.trajectories) for c in range(self.config.cycles)
                if self.member_path(t, c).exists()]

    def save_member(self, t, c, state_dict, **about):
        """A member: the weights in bf16, and what they are."""
        weights = {name: w.detach().to("cpu", torch.bfloat16, copy=True) for name, w in state_dict.items()}
        save_tensors(self.member_path(t, c), weights, cycle=c, identity=self.identity_of(t), **about)

    def read_member(self, t, c, check=True):
        """(weights: name -> bf16 tensor on disk, about) of a member of this population; "sha256" in about is that of them."""
        path = self.member_path(t, c)
        if not path.exists():
            refuse(f"{path} is gone: restore it, or delete {self.folder(t)} and train that again")
        try:
            weights, about = load_tensors(path, check)
        except Damaged as e:
            refuse(f"{path} {e}: move it away and go without it, or delete {self.folder(t)} and train that again")
        differ = self.differs(about.get("identity"), t)
        if differ:
            refuse(f"{path} is a member of another population ({differ}): move it away")
        return weights, about

    # ---- resume states, named by their step; the newest two stay

    def states(self, t):
        """Paths, oldest first."""
        return sorted(p for p in self.folder(t).glob("resume_*.pt")
                      if re.fullmatch(r"resume_\d{8}\.pt", p.name))

    def save_resume(self, t, tensors, **about):
        """about: at least `step`. Older states but one go, and newer ones, which could not be used."""
        path = self.folder(t) / f"resume_{about['step']:08d}.pt"
        save_tensors(path, tensors, identity=self.identity_of(t), **about)
        kept = [p for p in self.states(t) if p <= path][-2:]
        for old in set(self.states(t)) - set(kept):
            old.unlink()

    def read_resume(self, t):
        """The newest State that is whole, None where there is none. Says which ones it passes over."""
        reasons = []
        for path in reversed(self.states(t)):
            try:
                tensors, about = load_tensors(path)
                differ = self.differs(about.get("identity"), t)
                if differ:
                    raise Damaged(f"is of another population ({differ})")
                return State(tensors, about)
            except Damaged as e:
                reasons.append(f"{path} {e}")
                print(f"note: {reasons[-1]}; looking for an older one", file=sys.stderr)
        if reasons:
            refuse(f"{reasons[0]}, and no older one is whole: "
                   f"restore one, or delete {self.folder(t)} and train it again")
        if any(self.member_path(t, c).exists() for c in range(1, self.config.cycles)):
            refuse(f"trajectory_{t:02d} of {self.path} has members but no state to go on from: "
                   "restore its resume_*.pt, or move the folder away to train it again")

    # ---- scores, a file for each member and split

    def score_path(self, split, t, c):
        return self.path / "scores" / split / f"{t:02d}_{c:03d}.pt"

    def unscored(self, t, c):
        """The splits on which this very member has no scores."""
        own = self.read_member(t, c, check=False)[1]["sha256"]
        return [split for split in SPLITS if not self.score_path(split, t, c).exists()
                or self.read_scores(split, t, c, check=False)[1] != own]

    def save_scores(self, t, c, scores, weights_sha256):
        """scores: split -> (tokens,) float32 log-probabilities under the weights of this SHA-256."""
        for split, log_p in scores.items():
            if not np.isfinite(log_p).all():
                refuse(f"{self.member_path(t, c)} gives probabilities that are no numbers: move it away and go without it")
            save_tensors(self.score_path(split, t, c), {"log_p": torch.from_numpy(log_p)}, split=split,
                         weights_sha256=weights_sha256)

    def read_scores(self, split, t, c, tokens=None, check=True):
        """((tokens,) float32, mapped from disk; the SHA-256 of the weights whose they are)."""
        path = self.score_path(split, t, c)
        try:
            tensors, about = load_tensors(path, check)
            if about.get("split") != split or tokens not in (None, len(tensors["log_p"])):
                raise Damaged("holds other scores")
        except Damaged as e:
            refuse(f"{path} {e}: delete it and run prior.py again")
        return tensors["log_p"].numpy(), about["weights_sha256"]

    # ---- metrics

    def log(self, **record):
        """
        One line of metrics.jsonl: a logged step, cycle or score. After a kill steps come again, and the last line of a step
        holds; a torn line is none.
        """
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "ab+") as f:
                torn = f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n"
                f.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
        except OSError as e:
            refuse(f"{path} could not be written: {e.strerror}; make room or mend it, and run this again")

    # ---- who may write here, and whether there is room

    def claim(self, world, folder=".", leftovers=(), **about):
        """
        For all ranks together: lock this folder of it, until the end of a `with`, sweep what killed writers left, write
        config.json where there is none (about: more for it). Exits with code 2 where another process has the lock, or a
        rank does not see rank 0's disk.
        """
        place = self.path / folder
        launch = " ".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
        world.refuse_together(self.lock(place, launch) if world.rank == 0 else None)
        if world.rank == 0:
            for pattern in leftovers:
                sweep(self.path, pattern)
            self.write_config(about)
        world.barrier(everyone=True)
        until = time.monotonic() + LAG
        while not (seen := self.sees(place, launch)) and time.monotonic() < until:
            time.sleep(0.5)
        world.refuse_together(None if seen else f"run_dir={self.path}: rank {world.rank}, on {platform.node()}, does not see "
                              "rank 0's disk: name a --run_dir that all ranks share")

    def lock(self, place, launch):
        """Why this process may not write there, if so."""
        try:
            place.mkdir(parents=True, exist_ok=True)
            self.locks.append(open(place / ".lock", "a"))
        except OSError as e:
            return f"run_dir={self.path}: cannot write to {place}: {e.strerror}; mend it, or name another --run_dir"
        try:
            fcntl.flock(self.locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)          # goes with the process, however it ends
        except BlockingIOError:
            return (f"run_dir={self.path}: another process writes to {place}: wait for it or stop it, "
                    "or name another --run_dir")
        except OSError:
            pass                # a file system without locks
        self.locks[-1].truncate(0)
        print(launch, end="", file=self.locks[-1], flush=True)

    def sees(self, place, launch):
        try:
            return (place / ".lock").read_text() == launch
        except OSError:         # not there yet
            return False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        while self.locks:
            self.locks.pop().close()

    def write_config(self, about):
        """config.json, where there is none."""
        code = code_version()
        if not self.config_path.exists():
            return write_json(self.config_path, {"identity": self.identity, "config": vars(self.config), "code": code,
                                                 "torch": torch.__version__, **about})
        theirs = read_json(self.config_path).get("code")
        if theirs != code:
            print(f"note: {self.path} was begun by code {theirs}, this is {code}; what is there stays, "
                  "for a fresh start name another --run_dir", file=sys.stderr)

    def begin(self, world, first, end, **about):
        """
        Claim the directory for cycles first .. end - 1. The states to go on from, trajectory -> State or None.
        Exits with code 2 where a trajectory has not had the cycles before.
        """
        def behind(t):
            return (f"run_dir={self.path}: trajectory {t} has not had the {first} cycles before distill_from: "
                    "run train.py on this config first")
        if first > 0 and not self.path.exists():
            refuse(behind(0), common=True)
        self.claim(world, leftovers=(".config.json.*", "trajectory_*/.*"), **about)
        states = {t: self.read_resume(t) for t in world.trajectories}
        done = {t: state.about["cycles_done"] if state else 0 for t, state in states.items()}
        world.refuse_together(next((behind(t) for t in done if done[t] < first), None))
        for t, state in states.items():
            differ = differences(state.about["setup"], setup(self.config, world)) if state and done[t] < end else ""
            if differ and world.lead:
                print(f"note: trajectory {t} goes on under another set-up ({differ}): "
                      "not bit for bit what it would have been", file=sys.stderr)
        return states

    def check_room(self, parameters):
        """Exits with code 2 where the disk has no room for what will still be written, of a model of so many parameters."""
        # a member: bf16; a state: fp32 weights, two moments, their average
        c, member, state = self.config, 2 * parameters, (16 if self.config.ema_decay else 12) * parameters
        need = (c.trajectories * c.cycles - len(self.members())) * member
        need += max(0, c.trajectories * 2 + 1 - len([*self.path.glob("trajectory_*/resume_*.pt")])) * state
        need += max(0, c.trajectories * c.cycles * 4 * (c.fitness_tokens + c.val_tokens)
                    - sum(p.stat().st_size for p in self.path.glob("scores/*/*.pt")))
        free = shutil.disk_usage(self.there).free
        if need > free:
            refuse(f"run_dir={self.path}: {need / 1e9:,.1f} GB are still to be written, {free / 1e9:,.1f} GB are free there: "
                   "make room, or name another --run_dir")


def read_prior(folder):
    """folder/prior.json. Exits with code 2 where it is not there, is damaged, or of another kind."""
    path = Path(folder) / "prior.json"
    prior = read_json(path) if path.exists() else refuse(f"no {path}: run prior.py on its config first")
    return prior if "answers" in prior else refuse(f"{path} is not what prior.py writes: run it on its config again")


if __name__ == "__main__":
    config, _ = from_args(None, __doc__)
    Run(config, data_fingerprint=None)
    print(processes(config))
