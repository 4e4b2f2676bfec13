"""
The run directory in which the scripts meet: members (bf16 weights and what they are), resume states, scores and metrics.
Nothing here knows the model or the data.

`python -m population CONFIG [--name=value ...]` checks a config and its run directory, and prints how many processes
run.sh starts for it.
"""
import contextlib
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
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from config import FIELDS, from_args
from errors import first_here, first_rank, refuse
from files import (Damaged, dense, differences, load, load_tensors, read_json, save_tensors, sha256_of, sweep,
                   write_json, write_whole)
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
STUDENT = -1, 0         # stands for (t, c) of a student of the whole population
SPLITS = "fit", "val"   # the held-out sets: for the prior, and to report
LAG = 120               # seconds until another machine sees what was written on a shared disk
STORED = 64             # a stored mixture's probabilities of a token


def mixture_bytes(config):
    """Of one stored mixture, on all packings of a trajectory; 0 where none teaches."""
    taught = config.distill_teacher == "mixture" and config.distill_from < config.cycles
    return taught * config.packings * (config.train_tokens - config.fitness_tokens) * 4 * STORED


State = namedtuple("State", "tensors about")        # to go on from: name -> tensor on disk, and plain values


class Run:
    """
    The run directory of a config. Exits with code 2 where it belongs to another config or other data (data_fingerprint
    None: any will do), or cannot be written. `mend` ends that message, `more` joins the identity that is compared. Nothing
    is written before it is locked; locks are held until the end of a `with`. t and c are trajectory and cycle.
    """

    def __init__(self, config, data_fingerprint, mend="name another --run_dir, or move it away", **more):
        self.config, self.path, self.locks = config, Path(config.run_dir), {}       # folder -> the open file whose lock is held
        # through JSON and back, so that what is compared is what a file can hold
        self.identity = json.loads(json.dumps({**config.identity(), "data_fingerprint": data_fingerprint, **more}))
        self.config_path = self.path / "config.json"
        if self.config_path.exists():
            differ = self.differs(read_json(self.config_path).get("identity"),
                                  leave="data_fingerprint" if data_fingerprint is None else "")
            if differ:
                refuse(f"run_dir={self.path} belongs to another config: {differ}; {mend}")
        self.there = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        try:
            tempfile.TemporaryFile(dir=self.there).close()
        except OSError as e:
            refuse(f"run_dir={self.path}: cannot write there: {e.strerror}; name another --run_dir")

    def differs(self, identity, leave=""):
        """
        How an identity from a file differs from ours, as text.
        Settings that older code did not have count as today's defaults.
        """
        return differences({**DEFAULTS, **identity} if isinstance(identity, dict) else identity, self.identity, leave)

    # ---- members

    def folder(self, t):
        return self.path / f"trajectory_{t:02d}"

    def member_path(self, t, c):
        return self.path / "student.pt" if (t, c) == STUDENT else self.folder(t) / f"cycle_{c:03d}.pt"

    def dropped_path(self, t, c):
        return self.member_path(t, c).with_suffix(".dropped")

    def members(self):
        """The (t, c) of every member that is there, or that keep=last dropped once it was scored; in order."""
        return [(t, c) for t in range(self.config.trajectories) for c in range(self.config.cycles)
                if self.member_path(t, c).exists() or self.dropped_path(t, c).exists()]

    def student(self):
        """[STUDENT] where there is one."""
        return [STUDENT] * self.member_path(*STUDENT).exists()

    def save_member(self, t, c, state_dict, **about):
        """A member: the weights in bf16, and what they are. Returns their SHA-256."""
        weights = {name: w.detach().to("cpu", torch.bfloat16, copy=True) for name, w in state_dict.items()}
        return save_tensors(self.member_path(t, c), weights, trajectory=t, cycle=c, identity=self.identity, **about)

    def drop_member(self, t, c):
        """The weights of a member that is scored go; its scores stay, and an empty file in its place."""
        if self.member_path(t, c).exists() and not self.unscored(t, c, check=True):
            write_whole(self.dropped_path(t, c), lambda f: None)
            self.member_path(t, c).unlink()

    def mend(self, t):
        """What to do about a damaged member."""
        return ("delete it and run distill.py --student again" if t == STUDENT[0] else
                f"move it away and go without it, or delete {self.folder(t)} and train that again")

    def read_member(self, t, c, check=True):
        """
        (weights: name -> bf16 tensor on disk, about) of a member of this population;
        "sha256" in about is that of its weights.
        """
        path, mend = self.member_path(t, c), self.mend(t)
        if not path.exists():
            refuse(f"{path} is gone: " + (
                "keep=last dropped it when it was scored; where its scores are gone, restore them, or delete "
                f"{self.dropped_path(t, c)} to go on without; what needs more of it wants a run with keep=all"
                if self.dropped_path(t, c).exists() else
                f"restore it, or delete {self.folder(t)} and train that again"))
        try:
            weights, about = load_tensors(path, check)
        except Damaged as e:
            refuse(f"{path} {e}: {mend}")
        differ = self.differs(about.get("identity"))
        if differ:
            refuse(f"{path} is a member of another population ({differ}): {mend}")
        return weights, about

    # ---- resume states, named by their step; the newest two stay

    def states(self, t):
        """Paths, oldest first."""
        return sorted(p for p in self.folder(t).glob("resume_*.pt")
                      if re.fullmatch(r"resume_\d{8}\.pt", p.name))

    def save_resume(self, t, tensors, **about):
        """about: at least `step`. Older states but one go, and newer ones, which could not be used."""
        path = self.folder(t) / f"resume_{about['step']:08d}.pt"
        save_tensors(path, tensors, trajectory=t, identity=self.identity, **about)
        kept = [p for p in self.states(t) if p <= path][-2:]
        for old in set(self.states(t)) - set(kept):
            old.unlink()

    def read_resume(self, t):
        """The newest State that is whole, None where there is none. Says which ones it passes over."""
        reasons = []
        for path in reversed(self.states(t)):
            try:
                tensors, about = load_tensors(path)
                differ = self.differs(about.get("identity"))
                if differ:
                    raise Damaged(f"is of another population ({differ})")
                if (not all(type(about.get(key)) is int and about[key] >= 0
                            for key in ("step", "position", "cycles_done", "cycle_step"))
                        or not isinstance(about.get("setup"), dict)):
                    raise Damaged("is no resume state")
                return State(tensors, about)
            except Damaged as e:
                reasons.append(f"{path} {e}")
                print(f"note: {reasons[-1]}; looking for an older one", file=sys.stderr)
        if reasons:
            refuse(f"{reasons[0]}, and no older one is whole: "
                   f"restore one, or delete {self.folder(t)} and train it again")

    # ---- the mixture of the first n members, as far as it is stored to teach, at places (packing, part); the newest two stay

    def mixture_path(self, t, n, place):
        packing, part = place
        return self.folder(t) / f"mixture_{n:03d}_{packing}_{part:02d}.pt"

    def has_mixture(self, t, n, place, made_from):
        """Whether it is there, and this one."""
        try:
            return load_tensors(self.mixture_path(t, n, place), check=False)[1].get("made_from") == made_from
        except Damaged:
            return False

    def save_mixture(self, t, n, place, tensors, made_from):
        """
        "p" and "ids" (sequences, T, k) and "fit" (tokens,), its log-probabilities on the fitness set;
        made_from: what says that it is this one.
        """
        save_tensors(self.mixture_path(t, n, place), tensors, made_from=made_from)
        with contextlib.suppress(FileNotFoundError):
            self.mixture_path(t, n - 2, place).unlink()

    def read_mixture(self, t, n, place, check=True):
        """Its tensors, mapped from disk."""
        path = self.mixture_path(t, n, place)
        try:
            return load_tensors(path, check)[0]
        except Damaged as e:
            refuse(f"{path} {e}: delete it and run this again, which makes it anew")

    def drop_mixtures(self, t):
        """What is stored of a trajectory that no mixture teaches any more."""
        for path in self.folder(t).glob("mixture_*.pt"):
            path.unlink()

    # ---- scores, a file for each member and split

    def score_path(self, split, t, c):
        name = "student" if (t, c) == STUDENT else f"{t:02d}_{c:03d}"
        return self.path / "scores" / split / f"{name}.pt"

    def unscored(self, t, c, check=False):
        """The splits on which this very member, or one whose weights were dropped, has no scores."""
        scored = {split: self.read_scores(split, t, c, check=check)[1]
                  for split in SPLITS if self.score_path(split, t, c).exists()}
        own = self.read_member(t, c, check=False)[1]["sha256"] if self.member_path(t, c).exists() else scored.get("fit")
        return [split for split in SPLITS if split not in scored or scored[split] != own]

    def save_scores(self, t, c, scores, weights_sha256):
        """scores: split -> (tokens,) float32 log-probabilities under the weights of this SHA-256."""
        for split, log_p in scores.items():
            if not np.isfinite(log_p).all():
                refuse(f"{self.member_path(t, c)} gives probabilities that are no numbers: {self.mend(t)}")
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
            refuse(f"{path} {e}: " + ("delete it and run prior.py again" if self.member_path(t, c).exists() else
                                      f"restore it, or delete {self.dropped_path(t, c)} to go on without this member"))
        return tensors["log_p"].numpy(), about["weights_sha256"]

    # ---- metrics

    def log(self, **record):
        """One line of metrics.jsonl: a logged step, cycle or score."""
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            refuse(f"{path} could not be written: {e.strerror}; make room or mend it, and run this again")

    def cut_metrics(self, begun):
        """Take out what will be logged again after these states (trajectory -> about), and torn lines."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        def stays(line):
            try:
                record = json.loads(line)
                about = begun.get(record["trajectory"])         # None: of a trajectory that this run leaves alone
                return (about is None
                        or record["kind"] == "score"
                        or record["step"] <= about["step"]
                            and (record["kind"] == "step" or record["cycle"] < about["cycles_done"]))
            except (ValueError, KeyError, TypeError):
                return False
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            write_whole(path, lambda f: f.writelines(kept))

    # ---- who may write here, and whether there is room

    def lock(self, folder, doing):
        """Why this process may not be the one that does it, if so; the lock goes with the process, however it ends."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.locks[folder] = open(folder / ".lock", "a")
        except OSError as e:
            return (f"run_dir={self.path}: cannot write to {folder} on {platform.node()}: {e.strerror}; "
                    "mend it, or name another --run_dir")
        try:
            fcntl.flock(self.locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return (f"run_dir={self.path}: another process is {doing} {folder} on {platform.node()}: "
                    "wait for it or stop it, or name another --run_dir")
        except OSError:
            pass                # a file system without locks

    def lock_folders(self, world, folders):
        """For all ranks together: lock these, each rank its own. Exits with code 2 where another process trains there."""
        reasons = [self.lock(folder, "training") for folder in folders if folder not in self.locks]
        for reason in filter(None, sum(world.gather(reasons), [])):
            refuse(reason, common=True)

    def check_group(self, world):
        """Exits with code 2 where the ranks of a group, on several machines, do not see one disk."""
        if world.data_size == 1:
            return
        path, mark = self.folder(world.trajectories[0]) / ".mark", f"{time.time_ns()} {platform.node()} {os.getpid()}\n"
        if world.lead:
            write_whole(path, lambda f: f.write(mark.encode()))
        mark = world.gather(mark)[world.rank - world.data_rank]         # the lead's

        def seen():
            try:
                return path.read_text() == mark
            except OSError:                         # not there yet, or just replaced
                return False
        until = time.monotonic() + LAG
        while not seen() and time.monotonic() < until:
            time.sleep(0.5)
        if not all(world.gather(seen())):
            refuse(f"run_dir={self.path}: {world.data_size} ranks are to train a trajectory together, on machines whose disks "
                   "differ: name a --run_dir that all of them see, or start so many processes that every machine has "
                   "trajectories of its own", common=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        while self.locks:
            self.locks.popitem()[1].close()

    def claim(self, world, begun):
        """
        For all ranks together, once it is locked, to go on from these states (trajectory -> about): on every machine, which
        may have a disk of its own, sweep it, cut metrics.jsonl back and write config.json.
        """
        if first_here():
            sweep(self.path, "scores/*/.*")
            for pattern in (".config.json.*", ".metrics.jsonl.*", "trajectory_*/.*"):
                sweep(self.path, pattern, others=True)          # nobody else trains here
        world.barrier(everyone=True)                # before one writes what another would sweep
        if first_here():
            self.cut_metrics(begun)
            self.write_config()
        world.barrier(everyone=True)

    def write_config(self):
        """config.json, where there is none."""
        code = code_version()
        if self.config_path.exists():
            theirs = read_json(self.config_path).get("code")
            if theirs != code:
                print(f"note: {self.path} was begun by code {theirs}, this is {code}; what is there stays, "
                      "for a fresh start name another --run_dir", file=sys.stderr)
            return
        write_json(self.config_path, {"identity": self.identity, "config": vars(self.config),
                                      "code": code, "torch": torch.__version__})

    def claim_scores(self):
        """For prior.py, which may run beside training."""
        if first_rank():
            busy = self.lock(self.path / "scores", "scoring")
            if busy:
                refuse(busy)
            if next(self.path.glob("scores/*.json"), None):
                refuse(f"{self.path}/scores was written by an older version of this code: move it away and run this again, "
                       "or, where keep=last dropped members, go on with that version")
        if first_here():
            sweep(self.path, "scores/*/.*")
            sweep(self.path, ".prior.json.*")

    def begin(self, world, first, end):
        """
        Claim the directory for cycles first .. end - 1. The states to go on from, trajectory -> State or None.
        Exits with code 2 where a trajectory has not had the cycles before.
        """
        own = [self.path] * (world.rank == 0) + [self.folder(t) for t in world.trajectories] * world.lead
        self.lock_folders(world, [folder for folder in own if folder.exists()])     # before any state is read
        self.check_disks(world)
        states = {t: self.read_resume(t) for t in world.trajectories}
        found = world.gather({t: state.about if state else {"step": 0, "cycles_done": 0} for t, state in states.items()})
        begun = {t: about for of_rank in found for t, about in of_rank.items()}
        behind = sorted(t for t, about in begun.items() if about["cycles_done"] < first)
        if behind:
            refuse(f"run_dir={self.path}: trajectory {behind[0]} has not had the {first} cycles before distill_from: "
                   "run train.py on this config first", common=True)
        for t, state in states.items():
            if not state and any(self.member_path(t, c).exists() for c in range(1, self.config.cycles)):
                refuse(f"trajectory_{t:02d} of {self.path} has members but no state to go on from: "
                       "restore its resume_*.pt, or move the folder away to train it again")
        self.lock_folders(world, own)               # before any machine touches what may be another's run
        self.check_group(world)
        self.claim(world, begun)
        for t, state in states.items():
            differ = (differences(state.about["setup"], setup(self.config, world))
                      if state and state.about["cycles_done"] < end else "")
            if differ and world.lead:
                print(f"note: trajectory {t} goes on under another set-up ({differ}): "
                      "not bit for bit what it would have been", file=sys.stderr)
        return states

    def check_disks(self, world):
        """Exits with code 2 where a trajectory's newest state is on another machine than its ranks would look."""
        names = [max((p.name for p in self.states(t)), default="") for t in range(self.config.trajectories)]
        seen = world.gather((platform.node(), names, world.trajectories))
        for t in range(self.config.trajectories):
            name, machine = max((names[t], machine) for machine, names, _ in seen)
            lacks = [(rank, machine) for rank, (machine, names, own) in enumerate(seen) if t in own and names[t] < name]
            if lacks:
                refuse(f"{self.folder(t)}/{name} is on {machine} and not on {lacks[0][1]}, whose rank {lacks[0][0]} "
                       "would go on with it: start as many ranks, on the same machines, as trained it (torchrun orders "
                       "machines by name), or copy the folder", common=True)

    def check_room(self, world, parameters):
        """
        Exits with code 2 where the disk has no room for what this machine will still write,
        of a model of so many parameters.
        """
        # a member: bf16; a state: fp32 weights, two moments, their average
        c, member, state = self.config, 2 * parameters, (16 if self.config.ema_decay else 12) * parameters
        # trajectories trained on this machine
        here = len(world.trajectories) * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) // world.data_size)
        members = here * (c.cycles if c.keep == "all" else min(c.cycles, 3))
        need = max(0, members - len([*self.path.glob("trajectory_*/cycle_*.pt")])) * member
        need += max(0, here * 2 + 1 - len([*self.path.glob("trajectory_*/resume_*.pt")])) * state
        need += max(0, here * 2 * mixture_bytes(c) - sum(p.stat().st_size for p in self.path.glob("trajectory_*/mixture_*.pt")))
        need += max(0, here * c.cycles * 4 * (c.fitness_tokens + c.val_tokens)
                    - sum(p.stat().st_size for p in self.path.glob("scores/*/*.pt")))
        free = shutil.disk_usage(self.there).free
        if need > free:
            refuse(f"run_dir={self.path}: {need / 1e9:,.1f} GB are still to be written, {free / 1e9:,.1f} GB are free there: "
                   "make room, name another --run_dir"
                   + ", or set --keep=last, which keeps every member's scores but only the newest weights" * (
                       c.keep == "all" and c.distill_teacher == "predecessor")
                   + ", or lower --packings" * (mixture_bytes(c) > 0))


class SlowrunFolder(Run):
    """
    A run directory whose members are the snapshots of the public Slowrun script, read only, where they lie:
    model_{i}.pt is trajectory i // cycles, cycle i % cycles, a dict of tensors in bf16 or fp32.
    """

    def __init__(self, config, data_fingerprint, folder):
        super().__init__(config, data_fingerprint)
        self.snapshots, expected = Path(folder), config.trajectories * config.cycles
        there = sorted(int(m[1]) for m in (re.fullmatch(r"model_(0|[1-9]\d*)\.pt", p.name)
                                           for p in self.snapshots.glob("model_*.pt")) if m)
        if not there or there[-1] >= expected:
            refuse(f"members={folder} holds {f'model_{there[-1]}.pt' if there else 'no model_0.pt, model_1.pt, ...'}; "
                   f"trajectories={config.trajectories} x cycles={config.cycles} expect "
                   f"model_0.pt .. model_{expected - 1}.pt: name their folder, and its trajectories and cycles")
        if next(self.path.glob("trajectory_*/cycle_*"), None):
            refuse(f"run_dir={self.path} has members of its own: name another --run_dir for the scores of {folder}")

    def claim(self, world, begun):
        self.lock_folders(world, [self.path] * (world.rank == 0))
        super().claim(world, begun)

    def member_path(self, t, c):
        return self.snapshots / f"model_{t * self.config.cycles + c}.pt"

    def mend(self, t):
        return "fetch it again, or move it away and go without it"

    def read_member(self, t, c, check=True):
        """(weights: name -> tensor on disk, about); the prefixes of DDP and torch.compile go."""
        path = self.member_path(t, c)
        try:
            weights = load(path)
        except Damaged as e:
            refuse(f"{path} {e}: {self.mend(t)}")
        if not isinstance(weights, dict) or not all(isinstance(n, str) and dense(w) and w.is_floating_point()
                                                    for n, w in weights.items()):
            refuse(f"{path} is no snapshot of the Slowrun script, a dict of bf16 or fp32 tensors: {self.mend(t)}")
        own = {re.sub(r"\b(module|_orig_mod)\.", "", name): w for name, w in weights.items()}
        if len(own) < len(weights):
            refuse(f"{path} holds a weight twice, with and without a prefix: {self.mend(t)}")
        with zipfile.ZipFile(path) as records:          # their checksums stand for the contents, without reading them
            sha256 = hashlib.sha256(
                repr([(r.filename.split("/", 1)[-1], r.CRC) for r in records.infolist()]).encode()).hexdigest()
            if check and records.testzip():
                refuse(f"{path} is damaged, its checksum is another: {self.mend(t)}")
        return own, dict(sha256=sha256)


def read_prior(folder):
    """folder/prior.json, checked to be what prior.py writes. Exits with code 2 where it is not there, or is not that."""
    path = Path(folder) / "prior.json"
    result = read_json(path) if path.exists() else refuse(f"no {path}: run prior.py on its config first")
    try:
        members, answers = result["members"], result["answers"]
        good = (all(type(n) is int and 0 <= n < 10_000 for m in members for n in (m["trajectory"], m["cycle"]))
                and all(isinstance(m["weights_sha256"], str) for m in members))
        good &= all(isinstance(result["text"].get(key, ""), str) for key in ("data", "text_sha256"))
        good &= {"best", "learned"} <= {a["rule"] for a in answers} and type(result["distill_from"]) is int
        for a in [a for a in answers if a["rule"] != "student"]:        # which is no member
            good &= (len(a["weights"]) == len(a["members"]) == a["K"] > 0
                     and set(a["members"]) <= set(range(len(members)))
                     and 0 <= min(a["weights"]))
            good &= a["val_error"] is None or 0 <= a["val_error"] < 1e9
        numbers = ([row[key] for row in [*members, *result["growing"], *answers] for key in ("fit_loss", "val_loss")]
                   + [g[key] for g in result["growing"] for key in ("cycle", "epochs")])
        good &= (len(numbers) > 2
                 and all(0 <= x < 1e9 for x in numbers)
                 and isinstance(result["text"], dict)
                 and bool(result["growing"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    return result if good else refuse(f"{path} is not what prior.py writes: run it on its config again")


def whole_mixture(prior):
    """
    [(its entry in members, weight)] of the learned prior over all members, of the contents of prior.json;
    and its fingerprint.
    """
    answer = max((a for a in prior["answers"] if a["rule"] == "learned"), key=lambda a: a["K"])
    pairs = [(prior["members"][i], w) for i, w in zip(answer["members"], answer["weights"]) if w > 0]
    return pairs, sha256_of([(m["weights_sha256"], w) for m, w in pairs])[:12]


def open_run(config, data_fingerprint, members):
    """The run directory, with its own members or (a folder's name) those of the public Slowrun script."""
    return SlowrunFolder(config, data_fingerprint, members) if members else Run(config, data_fingerprint)


if __name__ == "__main__":
    config = from_args(None, __doc__)
    Run(config, data_fingerprint=None)
    print(processes(config))
