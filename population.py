"""
Who trains what on which rank, and where it is kept. World: ranks, grouped by trajectory. Run: the run directory with
its members (bf16 weights and what they are), resume states, scores and metrics. A member is a state dict and a dict;
this file knows neither the model nor the data.

`python -m population CONFIG [--name=value ...]` checks a config and its run directory, and prints how many processes
run.sh starts for it.
"""
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shlex
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tqdm import tqdm

import config as config_module
from config import from_args, refuse


# ---------------------------------------------------------------------------------------------- ranks

def micro_batches(config, size):
    """Every micro_batch in which `size` ranks can share the batches of this config."""
    ranks = size // math.gcd(size, config.trajectories)
    sequences = [tokens // config.sequence_len for tokens in (config.batch_tokens, config.batch_tokens_ends)]
    return [m for m in range(1, min(sequences) // ranks + 1) if not any(n % (ranks * m) for n in sequences)]


def smaller_micro_batch(config, size):
    """What to do where micro_batch is too large."""
    fits = [m for m in micro_batches(config, size) if m < config.micro_batch]
    return f"try --micro_batch={fits[-1]}" if fits else None


def cannot_share(config, size):
    """Why `size` ranks cannot share the batches of this config (with the mend), or None."""
    if config.micro_batch in micro_batches(config, size):
        return None
    return (f"batch_tokens={config.batch_tokens} and batch_tokens_ends={config.batch_tokens_ends}, sequences of {config.sequence_len}, cannot be shared by "
            f"{size // math.gcd(size, config.trajectories)} ranks per trajectory in micro-batches of micro_batch={config.micro_batch}; "
            f"{smaller_micro_batch(config, size) or 'start fewer processes, or raise them'}")


@contextlib.contextmanager
def fits_in_memory(config):
    """Where a GPU's memory runs out inside: exits with code 2, naming the micro-batch to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        config_module.prints = True         # whichever rank it is
        mend = smaller_micro_batch(config, int(os.environ.get("WORLD_SIZE", 1))) or "no smaller one shares the batches, take a smaller model or more GPUs"
        mend += " (or --checkpoint=True)" * (config.loop_extra > 0 and not config.checkpoint)
        refuse(f"micro_batch={config.micro_batch} does not fit into this GPU's memory: {mend}"
               "; what is done is kept, and python -m tools.plan estimates what fits")


def processes(config):
    """How many processes to start on this machine: one per GPU, else one per trajectory up to the cores; fewer where
    those could not share a batch. Exits with code 2 where even one cannot."""
    most = torch.cuda.device_count() or min(config.trajectories, os.cpu_count())
    fitting = [size for size in range(1, most + 1) if not cannot_share(config, size)]
    return fitting[-1] if fitting else refuse(cannot_share(config, 1))


def progress_bar(iterable=None, **options):
    """tqdm's; in a log file a line now and then."""
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


@dataclass
class World:
    """
    gcd(ranks, trajectories) groups of equally many ranks; each group takes every groups-th trajectory, one after
    another. Rank `data_rank` of a group's `data_size` takes its share of every batch; rank 0 of a group writes.
    """
    rank: int
    size: int
    device: torch.device
    trajectories: list      # of this rank's group
    groups: int
    data_rank: int
    data_size: int
    data_group: object      # process group, None in a single process

    @property
    def lead(self):
        return self.data_rank == 0

    def progress(self, iterable=None, **options):
        """A bar on rank 0."""
        return progress_bar(iterable, disable=self.rank > 0 or iterable == [], **options)

    def to_device(self, rows):
        """A tensor of the CPU's; a GPU does not wait for the copy."""
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def mean(self, value):
        """The mean of a tensor of one element over the ranks of this group, as a float."""
        if self.data_size > 1:
            dist.all_reduce(value, group=self.data_group)
        return value.item() / self.data_size

    def gather(self, value):
        """The plain values of all ranks, in their order, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def send(self, value, source):
        """A plain value of rank `source`, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=source)
        return values[0]

    def barrier(self, everyone=False):
        """Wait for the ranks of this group, or for all."""
        if self.size > 1:
            dist.barrier(group=None if everyone else self.data_group)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def keep_freed_memory():
    """On the CPU: glibc keeps what tensors free, else every step faults it in again, a tenth of the demo's time."""
    with contextlib.suppress(OSError, AttributeError):          # another C library
        mallopt, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)                      # the most it takes


def join_world(config):
    """The World of this process, from torchrun's environment. Exits with code 2 where the ranks cannot share a batch."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    reason = cannot_share(config, size)
    if reason:
        refuse(reason)
    groups = math.gcd(size, config.trajectories)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    data_rank, data_size, data_group = 0, 1, None
    keep_freed_memory()
    if kind == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            refuse(f"{torch.cuda.get_device_name(device)} has neither bf16 nor flash attention: use a GPU of compute capability 8.0 or more, or the CPU (CUDA_VISIBLE_DEVICES=)", common=True)
        if config.n_embd // config.n_head % 8 or config.n_embd // config.n_head > 256:
            refuse(f"n_head={config.n_head}: flash attention wants heads of a multiple of 8, up to 256, n_embd={config.n_embd} gives {config.n_embd // config.n_head}; change one", common=True)
        torch.cuda.set_device(device)
    if size > 1:
        backend = dict(backend="nccl", device_id=device) if kind == "cuda" else dict(backend="gloo")
        dist.init_process_group(**backend, timeout=timedelta(days=30))      # groups of ranks may finish hours apart
        data_size = size // groups
        data_rank, members = rank % data_size, [list(range(i, i + data_size)) for i in range(0, size, data_size)]
        data_group, _ = dist.new_subgroups_by_enumeration(members, timeout=timedelta(days=30))
    group = rank // (size // groups)
    config_module.prints = data_rank == 0
    return World(rank, size, device, list(range(group, config.trajectories, groups)), groups, data_rank, data_size, data_group)


# -------------------------------------------------------------------------------------- run directory

def next_command(script, argv):
    """What to run after this script, on the same arguments (argv None: the process's own)."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    launcher = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', ranks)}" if ranks > 1 and script.endswith(".py") else "python"
    return f"next: {launcher} {script} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def write_whole(path, save):
    """Write a file whole or not at all: save(open file) goes to a temporary name beside it, renamed when on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}")
    with open(temporary, "wb") as f:
        save(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_whole(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        refuse(f"{path} is not readable ({type(e).__name__}): restore it, or delete it and run the script that writes it again")


def read_tensors(path, mend):
    """A file of tensors and plain values, the tensors mapped from disk. Exits with code 2 where it is damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as e:      # torch.load raises nearly anything on damaged bytes
        refuse(f"{path} is not readable ({type(e).__name__}): {mend}")


def code_version():
    """SHA-256, shortened, of the Python files of the method: an edited copy is another version."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("data/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def differences(theirs, mine):
    """The keys in which two identities differ, with both values; empty where they agree."""
    return "; ".join(f"{k} is {theirs.get(k)} there and {mine.get(k)} here" for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k))


class Run:
    """
    The run directory of a config; exits with code 2 where one of another config or other data stands there (of any data
    where data_fingerprint is None), or none can be made. Nothing is written before claim(). t and c are trajectory and cycle.
    """

    def __init__(self, config, data_fingerprint):
        self.config, self.path = config, Path(config.run_dir)
        # through JSON and back, so that what is compared is what a file can hold
        self.identity = json.loads(json.dumps({**config.identity(), "data_fingerprint": data_fingerprint}))
        self.config_path = self.path / "config.json"
        if self.config_path.exists():
            theirs = dict(read_json(self.config_path).get("identity") or {})
            if data_fingerprint is None:
                theirs["data_fingerprint"] = None
            differ = differences(theirs, self.identity)
            if differ:
                refuse(f"run_dir={self.path} belongs to another config: {differ}; name another --run_dir")
        there = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as e:
            refuse(f"run_dir={self.path}: cannot write there: {e.strerror}; name another --run_dir")

    def claim(self):
        """Make the directory, with config.json, where there is none; one rank per machine."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        code = code_version()
        if self.config_path.exists():
            begun = read_json(self.config_path).get("code")
            if begun != code:
                print(f"note: {self.path} was begun by code {begun}, this is {code}; what is there stays, for a fresh start name another --run_dir", file=sys.stderr)
            return
        write_json(self.config_path, {"identity": self.identity, "config": vars(self.config), "code": code, "torch": torch.__version__})

    def member_path(self, t, c):
        return self.path / f"trajectory_{t:02d}" / f"cycle_{c:03d}.pt"

    def members(self):
        """The (t, c) of every member that is there, in order."""
        return [(t, c) for t in range(self.config.trajectories) for c in range(self.config.cycles) if self.member_path(t, c).exists()]

    def save_member(self, t, c, state_dict, **about):
        """A member: the weights in bf16, and what they are as one JSON text with their own fingerprint."""
        weights = {name: w.detach().to("cpu", torch.bfloat16, copy=True) for name, w in state_dict.items()}
        digest = hashlib.sha256()
        for w in weights.values():
            digest.update(w.view(torch.int16).numpy())
        about = dict(trajectory=t, cycle=c, **about, weights_sha256=digest.hexdigest(), identity=self.identity)
        write_whole(self.member_path(t, c), lambda f: torch.save({"weights": weights, "about": json.dumps(about)}, f))

    def mend(self, t):
        """What to do about a damaged member."""
        return f"delete trajectory_{t:02d} and run train.py and distill.py again, they train what is missing"

    def read_member(self, t, c):
        """(weights: name -> bf16 tensor on disk, about) of a member of this population."""
        path, mend = self.member_path(t, c), self.mend(t)
        file = read_tensors(path, mend)
        try:
            weights, about = file["weights"], json.loads(file["about"])
        except (KeyError, TypeError, ValueError):
            refuse(f"{path} is no member: {mend}")
        differ = differences(about.get("identity", {}), self.identity)
        if differ:
            refuse(f"{path} is a member of another population ({differ}): {mend}")
        return weights, about

    def save_resume(self, t, state):
        write_whole(self.path / f"trajectory_{t:02d}" / "resume.pt", lambda f: torch.save(state, f))

    def read_resume(self, t):
        """What save_resume wrote, or None."""
        path, mend = self.path / f"trajectory_{t:02d}" / "resume.pt", self.mend(t)
        state = read_tensors(path, mend) if path.exists() else None
        if state is not None and not (isinstance(state, dict) and {"model", "optimizer", "position", "cycles_done", "step"} <= state.keys()):
            refuse(f"{path} is no resume state: {mend}")
        return state

    def score_paths(self, t, c):
        """split -> the file of one member's scores; "of" says whose they are."""
        folder, name = self.path / "scores", f"{t:02d}_{c:03d}"
        return {"fit": folder / "fit" / f"{name}.npy", "val": folder / "val" / f"{name}.npy", "of": folder / f"{name}.json"}

    def fingerprint(self, t, c):
        """SHA-256 of the weights that one member's scores belong to, None without scores."""
        path = self.score_paths(t, c)["of"]
        return read_json(path).get("weights_sha256") if path.exists() else None

    def scored(self, t, c):
        """Whether the scores of this very member are there."""
        return self.fingerprint(t, c) == self.read_member(t, c)[1]["weights_sha256"]

    def save_scores(self, t, c, scores):
        """scores: split -> (tokens,) float32 log-probabilities. Whose they are is written last, and makes them valid."""
        paths = self.score_paths(t, c)
        for split, log_p in scores.items():
            if not np.isfinite(log_p).all():
                refuse(f"{self.member_path(t, c)} gives probabilities that are no numbers: {self.mend(t)}")
            write_whole(paths[split], lambda f: np.save(f, log_p))
        write_json(paths["of"], {"weights_sha256": self.read_member(t, c)[1]["weights_sha256"]})

    def read_scores(self, split, t, c, tokens):
        """(tokens,) float32, mapped from disk."""
        path = self.score_paths(t, c)[split]
        try:
            scores = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            scores = np.array([np.nan]) if path.exists() else refuse(f"{path} is gone: delete {path.parent.parent} and run prior.py again ({e})")
        if scores.dtype != np.float32 or scores.shape != (tokens,) or not np.isfinite(scores).all() or scores.max() > 1e-3:
            refuse(f"{path} is damaged, not a list of log-probabilities: delete {path.parent.parent} and run prior.py again")
        return scores

    def read_score_files(self, t, c):
        return {kind: path.read_bytes() for kind, path in self.score_paths(t, c).items()}

    def write_score_files(self, t, c, files):
        for kind, path in self.score_paths(t, c).items():
            write_whole(path, lambda f: f.write(files[kind]))

    def log(self, **record):
        """One line of metrics.jsonl: a logged step, cycle or score."""
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


class SlowrunFolder(Run):
    """
    A run directory whose members are the snapshots of the public Slowrun script, read only, where they lie:
    model_{i}.pt is trajectory i // cycles, cycle i % cycles, a dict of tensors in bf16 or fp32.
    """

    def __init__(self, config, data_fingerprint, folder):
        super().__init__(config, data_fingerprint)
        self.folder, expected = Path(folder), config.trajectories * config.cycles
        there = sorted(int(m[1]) for m in (re.fullmatch(r"model_(0|[1-9]\d*)\.pt", p.name) for p in self.folder.glob("model_*.pt")) if m)
        if not there or there[-1] >= expected:
            refuse(f"members={folder} holds {f'model_{there[-1]}.pt' if there else 'no model_0.pt, model_1.pt, ...'}; trajectories={config.trajectories} x "
                   f"cycles={config.cycles} expect model_0.pt .. model_{expected - 1}.pt: name their folder, and its trajectories and cycles")
        if next(self.path.glob("trajectory_*"), None):
            refuse(f"run_dir={self.path} has members of its own: name another --run_dir for the scores of {folder}")

    def member_path(self, t, c):
        return self.folder / f"model_{t * self.config.cycles + c}.pt"

    def mend(self, t):
        return "fetch it again, or move it away and go without it"

    def read_member(self, t, c):
        """(weights: name -> tensor on disk, about); the prefixes of DDP and torch.compile go."""
        path = self.member_path(t, c)
        weights = read_tensors(path, self.mend(t))
        dense = lambda w: isinstance(w, torch.Tensor) and w.is_floating_point() and w.layout == torch.strided and not w.is_meta
        if not isinstance(weights, dict) or not all(isinstance(n, str) and dense(w) for n, w in weights.items()):
            refuse(f"{path} is no snapshot of the Slowrun script, a dict of bf16 or fp32 tensors: {self.mend(t)}")
        own = {re.sub(r"\b(module|_orig_mod)\.", "", name): w for name, w in weights.items()}
        if len(own) < len(weights):
            refuse(f"{path} holds a weight twice, with and without a prefix: {self.mend(t)}")
        with zipfile.ZipFile(path) as records:          # their checksums stand for the contents, without reading them
            digest = hashlib.sha256(repr([(r.filename.split("/", 1)[-1], r.CRC) for r in records.infolist()]).encode()).hexdigest()
        return own, dict(weights_sha256=digest)


def open_run(config, data_fingerprint, members):
    """The run directory, with its own members or (a folder's name) those of the public Slowrun script."""
    return SlowrunFolder(config, data_fingerprint, members) if members else Run(config, data_fingerprint)


if __name__ == "__main__":
    config = from_args(None, __doc__)
    Run(config, data_fingerprint=None)
    print(processes(config))
