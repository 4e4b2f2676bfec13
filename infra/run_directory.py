"""
The run directory in which the scripts meet: config.json, metrics.jsonl, members (bf16 weights and what they
are), checkpoints, scores, prior.json. t and c: trajectory and cycle, from 0.
"""
import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from infra.config import Config
from infra.console import ROOT, Damaged, fail, print0
from infra.files import append_json, clean_up, lock, read_json, read_tensors, write_json, write_tensors

SPLITS = "fit", "val"       # the held-out sets: for the prior, and to report
LAG = 120                   # seconds until another machine sees what was written on a shared disk


def differences(theirs, mine):
    """The keys in which two dicts differ, with both values, as text; empty where they agree."""
    return "; ".join(f"{k} is {theirs.get(k)} there and {mine.get(k)} here"
                     for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k))


def code_version():
    """SHA-256, shortened, of the method's Python files."""
    files = sorted(p for pattern in ("*.py", "data/*.py", "infra/*.py") for p in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def environment(config, ranks):
    """What the bits of a run depend on, beside its identity."""
    gpu, cpu = ranks.device.type == "cuda", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return dict(machine=torch.cuda.get_device_name() if gpu else cpu, torch=torch.__version__.split("+")[0],
                ranks=ranks.group_size, micro_batch=config.micro_batch, threads=torch.get_num_threads())


def load_prior(run_dir):
    """What prior.py wrote. Exits with code 2 where it has not."""
    path = Path(run_dir) / "prior.json"
    if not path.exists():
        fail(f"no '{path}': run prior.py first (of a student: distill.py and prior.py, with --student)")
    return read_json(path)


def prior_answer(prior, K, rule="learned", option="K"):
    """[(member, weight)] of prior.json's answer for K, where that is not 0. Exits with code 2: none for K."""
    answers = {a["K"]: a for a in prior["answers"] if a["rule"] == rule}
    if K not in answers:
        fail(f"{option}={K}: prior.json has answers for K = {', '.join(map(str, answers))}")
    members = [prior["members"][i] for i in answers[K]["members"]]
    return [(m, w) for m, w in zip(members, answers[K]["weights"]) if w > 0]


def check_room(c, path, parameters):
    """Exits with code 2 where the disk has no room for what a population of such models will still write."""
    # a checkpoint: fp32 weights, a moment, of some two, their average; a member: bf16, with fp32 scores
    checkpoint = (14 if c.ema_decay else 10) * parameters
    need = (2 * c.trajectories + 1) * checkpoint + c.trajectories * c.cycles * (
        2 * parameters + 4 * (c.fitness_tokens + c.val_tokens))
    for there in [*path.glob("trajectory_*/*"), *path.glob("scores/*/*")]:
        with contextlib.suppress(FileNotFoundError):            # another group has just renamed it
            need -= there.stat().st_size
    room = shutil.disk_usage(path).free
    if need > room:
        fail(f"run_dir='{path}': {need / 1e9:,.1f} GB are still to be written, {room / 1e9:,.1f} GB are free "
             "there: make room, or name another --run_dir")


class RunDirectory:
    """
    Exits with code 2 where it is another config's or other data's (data_fingerprint None: any will do), or
    cannot be written, but by who only reads. Writes nothing before open().
    """

    def __init__(self, config, data_fingerprint, only_read=False):
        self.config, self.path = config, Path(config.run_dir)
        self.whole = set()                      # trajectories whose newest checkpoint is known to be
        self.config_path = self.path / "config.json"
        theirs = read_json(self.config_path)["identity"] if self.config_path.exists() else {}
        fingerprint = data_fingerprint or theirs.get("data_fingerprint")
        self.identity = {**config.identity(), "data_fingerprint": fingerprint}
        if theirs and (differ := self.differs(theirs)):
            fail(f"run_dir='{self.path}' is of another config: {differ}; name another --run_dir, or move it "
                 "(of a student: give the --student_epochs and --student_alpha that it was begun with)")
        if only_read:
            return
        try:
            parent = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as e:
            fail(f"run_dir='{self.path}': cannot write there: {e.strerror}; name another --run_dir")

    def identity_of(self, t):
        """Of trajectory t's files, with its own seed: trajectory 0 of seed 43 may join seed 42's run as 1."""
        return {**self.identity, "seed": self.config.seed + t}

    def differs(self, identity, t=0):
        """How a file's identity differs from ours, as text; settings newer than it have their defaults."""
        mine = self.identity_of(t)
        return differences({name: getattr(Config, name, None) for name in mine} | identity, mine)

    @contextlib.contextmanager
    def open(self, ranks, folder=".", **about):
        """
        All ranks together: lock this folder of it, remove what killed writers left there, write config.json
        where there is none (about: more for it). Exits with code 2 where a rank sees another disk.
        """
        path, token = self.path / folder / ".lock", str(time.time_ns())
        with contextlib.ExitStack() as stack:
            if ranks.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(path, token))
                for place in (path.parent, *path.parent.glob("*/")):
                    clean_up(place)
                code = code_version()
                if not self.config_path.exists():
                    write_json(self.config_path, dict(identity=self.identity, config=vars(self.config),
                                                      code=code, torch=torch.__version__, **about))
                elif read_json(self.config_path)["code"] != code:
                    print0(f"note: '{self.path}' is of another version of the code; what is there stays")
            token, until = ranks.of_first(token), time.monotonic() + LAG    # the others wait for the first
            while not path.exists() or path.read_text() != token:
                if time.monotonic() > until:
                    fail(f"run_dir='{self.path}': rank {ranks.rank}, on {platform.node()}, does not see rank "
                         "0's disk: name a --run_dir that all ranks share")
                time.sleep(0.5)
            yield

    def folder(self, t):
        return self.path / f"trajectory_{t:02d}"

    def member_path(self, t, c):
        return self.folder(t) / f"cycle_{c:03d}.safetensors"

    def members(self):
        """The (t, c) of every member that is there, in order."""
        return [(t, c) for t in range(self.config.trajectories) for c in range(self.config.cycles)
                if self.member_path(t, c).exists()]

    def save_member(self, t, c, state_dict, **about):
        """The weights in bf16, and what they are."""
        weights = {name: w.detach().to("cpu", torch.bfloat16, copy=True) for name, w in state_dict.items()}
        kind = f"the member of cycle {c}"
        write_tensors(self.member_path(t, c), kind, weights, identity=self.identity_of(t), **about)

    def load_own(self, t, path, kind, check=True):
        """read_tensors() of a file of trajectory t; Damaged where it is another population's, too."""
        tensors, about = read_tensors(path, kind, check)
        if differ := self.differs(about["identity"], t):
            raise Damaged(path, f"is of another population ({differ})")
        return tensors, about

    def load_member(self, t, c, check=True):
        """(weights: name -> bf16 tensor on disk; about, with "tensors_sha256")."""
        return self.load_own(t, self.member_path(t, c), f"the member of cycle {c}", check)

    def save_checkpoint(self, t, tensors, step, environment):
        """The one before it stays, in case that this one is damaged."""
        newest, previous = (self.folder(t) / f"resume{name}.safetensors" for name in ("", "_previous"))
        if t in self.whole and newest.exists():
            os.replace(newest, previous)
            self.whole.remove(t)
        write_tensors(newest, "a checkpoint", tensors, identity=self.identity_of(t), step=step,
                      environment=environment)
        self.whole.add(t)

    def load_checkpoint(self, t):
        """(tensors on disk, about) of the newest that is whole; (None, {"step": 0}) of a new trajectory."""
        reason = None
        paths = (self.folder(t) / f"resume{name}.safetensors" for name in ("", "_previous"))
        for path in filter(Path.exists, paths):
            try:
                found = self.load_own(t, path, "a checkpoint")
                if path.name == "resume.safetensors":
                    self.whole.add(t)
                return found
            except Damaged as e:
                reason = reason or e
                print0(f"note: {e}; trying the previous one", prints=True)
        # the first member may be there before a checkpoint, but not an imported one, which has no loss
        there = [c for of, c in self.members() if of == t]
        if reason or there > [0] or there == [0] and "fit_loss" not in self.load_member(t, 0, check=False)[1]:
            reason = reason or f"'{self.folder(t)}' has members but no checkpoint to resume from: restore one"
            fail(f"{reason}, or delete '{self.folder(t)}' and train it again")
        return None, {"step": 0}

    def score_path(self, split, t, c):
        return self.path / "scores" / split / f"{t:02d}_{c:03d}.safetensors"

    def save_scores(self, split, t, c, log_p, weights_sha256):
        """Of one held-out set: (tokens,) float32 log-probabilities under the weights of this SHA-256."""
        if not np.isfinite(log_p).all():
            raise Damaged(self.member_path(t, c), "gives NaN or infinite log-probabilities")
        scores = {"log_p": torch.from_numpy(log_p)}
        write_tensors(self.score_path(split, t, c), f"{split} scores", scores, weights_sha256=weights_sha256)

    def load_scores(self, split, t, c, check=True):
        """((tokens,) float32, mapped from disk; the SHA-256 of the weights); (None, None): none."""
        path = self.score_path(split, t, c)
        if not path.exists():
            return None, None
        tensors, about = read_tensors(path, f"{split} scores", check)
        return tensors["log_p"].numpy(), about["weights_sha256"]

    def log(self, **record):
        """A line of metrics.jsonl. After a kill some steps come again: the last line of a step holds."""
        append_json(self.path / "metrics.jsonl", record)
