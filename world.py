"""
Who trains what, on which rank; how ranks wait for each other, and how a run is stopped.
"""
import contextlib
import ctypes
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import first_rank, refuse, speak

JOIN = timedelta(minutes=10)        # so long may the first rank that starts wait for the last
HANG = timedelta(hours=1)           # so long may ranks of a group wait for one of them: a member written, a step
STOPPED = 75                        # exit code of a run that was asked to stop, and saved (EX_TEMPFAIL: try again later)


# ------------------------------------------------------------------------------- which batches can be shared

def batch_sequences(config):
    """Of a step over all ranks of a trajectory: the sizes that occur."""
    return {config.batch_tokens // config.sequence_len, config.batch_tokens_ends // config.sequence_len}


def micro_batch_of(config, sequences, ranks):
    """Sequences of a backward pass: a rank's share of a batch in the fewest equal parts of at most micro_batch."""
    share = sequences // ranks
    return max(n for n in range(1, min(config.micro_batch, share) + 1) if share % n == 0)


def cannot_share(config, size):
    """Why `size` ranks cannot share the batches of this config (with the mend), or None."""
    fits = [n for n in range(1, size + 1) if not any(s % (n // math.gcd(n, config.trajectories)) for s in batch_sequences(config))]
    return None if size in fits else (
        f"batches of {' and '.join(map(str, sorted(batch_sequences(config))))} sequences (batch_tokens, batch_tokens_ends) cannot "
        f"be shared equally by {size // math.gcd(size, config.trajectories)} ranks for a trajectory; start {fits[-1]} processes")


def processes(config, most=None):
    """
    How many processes to start on this machine, at most so many (None: one per GPU, else one per trajectory up to the
    cores): fewer where those could not share a batch.
    """
    most = most or torch.cuda.device_count() or min(config.trajectories, len(os.sched_getaffinity(0)))
    return next(size for size in range(most, 0, -1) if not cannot_share(config, size))


# ------------------------------------------------------------------------------------------- the ranks

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
    data_group: object = None       # process group, None in a single process
    everyone: object = None         # all ranks, over gloo: groups may finish hours apart, which NCCL would take for a hang

    @property
    def lead(self):
        return self.data_rank == 0

    def progress(self, iterable=None, **options):
        """A bar on rank 0."""
        return progress_bar(iterable, disable=self.rank > 0 or iterable == [], **options)

    def to_device(self, rows):
        """A tensor of the CPU's; a GPU does not wait for the copy."""
        return rows.contiguous().pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def mean(self, *values):
        """Of numbers, over the ranks of a group: floats, in one exchange."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in values])
        if self.data_size > 1:
            dist.all_reduce(total, group=self.data_group)
        return [value / self.data_size for value in total.tolist()]

    def gather(self, value):
        """The plain values of all ranks, in their order, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.everyone)
        return values

    def refuse_together(self, reason):
        """Exits with code 2 on all ranks where one has a reason (the others: None), in one line."""
        for reason in filter(None, self.gather(reason)):
            refuse(reason, common=True)

    def barrier(self, everyone=False):
        """Wait for the ranks of this group, or for all."""
        if self.size > 1:
            dist.barrier(group=self.everyone if everyone else self.data_group)

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
    rank, size, local = (os.environ.get(k, d) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    if (not (rank + size + local).isdecimal()
            or int(rank) >= int(size)
            or int(size) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        speak()
        refuse(f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local}, with MASTER_ADDR and MASTER_PORT, "
               "are torchrun's to set: start with torchrun, or unset them")
    rank, size, local = int(rank), int(size), int(local)
    reason = cannot_share(config, size)
    if reason:
        refuse(reason)
    groups = math.gcd(size, config.trajectories)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    keep_freed_memory()
    if kind == "cpu" and os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        refuse(f"this machine's GPU cannot be used by its torch {torch.__version__}: "
               "install one that fits its driver (pytorch.org says which), or set CUDA_VISIBLE_DEVICES= for the CPU",
               common=True)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            refuse(f"this machine has {torch.cuda.device_count()} GPUs: start so many processes on it, not more", common=True)
        if torch.cuda.get_device_capability(device) < (8, 0):
            refuse(f"{torch.cuda.get_device_name(device)} has neither bf16 nor flash attention: "
                   "use a GPU of compute capability 8.0 or more, or the CPU (CUDA_VISIBLE_DEVICES=)", common=True)
        if config.n_embd // config.n_head % 8 or config.n_embd // config.n_head > 256:
            refuse(f"n_head={config.n_head}: flash attention wants heads of a multiple of 8, up to 256, "
                   f"n_embd={config.n_embd} gives {config.n_embd // config.n_head}; change one", common=True)
        torch.cuda.set_device(device)
    data_size = size // groups
    group, data_rank = divmod(rank, data_size)
    world = World(rank, size, device, list(range(group, config.trajectories, groups)), groups, data_rank, data_size)
    if size > 1:
        backend = dict(backend="nccl", device_id=device) if kind == "cuda" else dict(backend="gloo")
        dist.init_process_group(**backend, timeout=JOIN)
        world.data_group, _ = dist.new_subgroups_by_enumeration(
            [list(range(i, i + data_size)) for i in range(0, size, data_size)], timeout=HANG)
        world.everyone = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    speak(data_rank == 0)
    return world


# --------------------------------------------------------------------------------------- ends of a script

def next_command(script, argv):
    """How to run a script, on the same arguments (argv None: the process's own)."""
    ranks, nodes = os.environ.get("WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
    local = os.environ.get("LOCAL_WORLD_SIZE", ranks)
    active = os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable)
    launcher = "python" if active else shlex.quote(sys.executable)      # "python" may be another environment's
    if ranks != "1" and script.endswith(".py"):
        torchrun = "torchrun" if active and shutil.which("torchrun") else f"{launcher} -m torch.distributed.run"
        launcher = f"{torchrun} {'--standalone' if nodes == '1' else f'--nnodes={nodes}'} --nproc_per_node={local}"
    return (f"{launcher} {script} {shlex.join(sys.argv[1:] if argv is None else argv)}"
            + "    # on every node, with the same --rdzv flags" * (nodes != "1" and script.endswith(".py")))


def say_next(script, argv):
    """What to run once a script is done, from rank 0."""
    if first_rank():
        print("next:", next_command(script, argv))


@contextlib.contextmanager
def one_line_errors(config):
    """Where a GPU's memory runs out inside, another rank is gone, or Ctrl-C is pressed: one line instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        refuse("stopped; what is done is kept, run this again to go on", code=130)
    except torch.OutOfMemoryError:
        speak()             # whichever rank it is
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        size = micro_batch_of(config, max(batch_sequences(config)), ranks // math.gcd(ranks, config.trajectories))
        mend = f"try --micro_batch={size // 2}" if size > 1 else "take a smaller model or more GPUs"
        refuse(f"micro_batch={config.micro_batch} does not fit into this GPU's memory: {mend}"
               "; what is done is kept, and python -m tools.plan estimates what fits")
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        speak()
        refuse(f"rank {os.environ.get('RANK')} lost another one, which stopped or hangs: mend what its own last line says, "
               "then start all again; what was saved stays", code=1)


class StopSignals:
    """
    While entered, SIGTERM and Ctrl-C only set `asked`, so that a step can be finished and saved; another one, a second
    or more after the first (torchrun passes Ctrl-C on, so that it comes twice), ends the process at once, also where it
    waits for another rank: a thread of its own listens. `agreed`: what the ranks of a group made of it.
    """

    def __enter__(self):
        self.asked = self.agreed = False
        self.heard, self.rung = socket.socketpair()
        self.rung.setblocking(False)
        self.bell = signal.set_wakeup_fd(self.rung.fileno())            # a byte for every signal, whatever the main thread does
        self.handlers = {number: signal.signal(number, lambda *args: None) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def listen(self):
        first = 0.0
        while number := self.heard.recv(1):                             # nothing: the other end is closed
            if self.asked and time.monotonic() - first > 1:
                os._exit(128 + number[0])
            self.asked, first = True, first or time.monotonic()

    def __exit__(self, *exception):
        signal.set_wakeup_fd(self.bell)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.rung.close()
