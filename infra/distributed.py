"""
Who trains what, on which rank; how ranks exchange numbers; how a run is asked to stop.
`python -m infra.distributed CONFIG [--name=value ...]` checks a config and its run directory, and prints how
many processes run.sh starts for it.
"""
import contextlib
import math
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from infra.config import from_args
from infra.console import fail, script
from infra.run_directory import RunDirectory

JOIN_TIMEOUT, GROUP_TIMEOUT = timedelta(minutes=10), timedelta(hours=1)      # how long ranks wait for one


def cores():
    """That this process may use; macOS does not say which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def batch_sizes(config):
    """Sequences of a step, over all ranks of a trajectory: the values that occur."""
    return sorted({n // config.sequence_len for n in (config.batch_tokens, config.batch_tokens_ends)})


def micro_batch_size(config, sequences, ranks):
    """Sequences of a backward pass: a rank's share in the fewest equal parts of at most micro_batch."""
    share = sequences // ranks
    return max(n for n in range(1, min(config.micro_batch, share) + 1) if share % n == 0)


def can_share(config, world_size):
    """Whether so many ranks can share the steps of this config equally."""
    return not any(n % (world_size // math.gcd(world_size, config.trajectories)) for n in batch_sizes(config))


def processes(config, most=None):
    """How many to start on one machine, at most so many (None: one per GPU, else one per trajectory)."""
    most = most or torch.cuda.device_count() or min(config.trajectories, cores())
    return next(n for n in range(most, 0, -1) if can_share(config, n))


@dataclass
class Ranks:
    """
    gcd(world size, trajectories) groups of equally many ranks; a group takes every groups-th trajectory, one
    after another. Each rank of a group takes its share of every batch; the first (is_main) writes.
    """
    rank: int
    world_size: int
    device: torch.device
    groups: int
    trajectories: list                  # of this rank's group
    group_rank: int
    group_size: int
    group: object = None                # process group of this group; None for a single process
    world: object = None                # of all ranks, over gloo: NCCL takes hours of waiting for a hang

    @property
    def is_main(self):
        return self.group_rank == 0

    def mean(self, *values):
        """Of numbers, over the ranks of a group: floats, in one exchange."""
        total = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in values])
        if self.group_size > 1:
            dist.all_reduce(total, group=self.group)
        return [value / self.group_size for value in total.tolist()]

    def of_first(self, value):
        """The first rank's plain value, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.world)
        return values[0]

    def barrier(self, everyone=False):
        if self.world_size > 1:
            dist.barrier(group=self.world if everyone else self.group)

    def leave(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def pick_device(config, local_rank):
    """This rank's GPU, or the CPU. Exits with code 2 where there is a GPU that cannot be used."""
    if not torch.cuda.is_available():
        if os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            fail(f"torch {torch.__version__} cannot use this machine's GPU: install one that fits its "
                 "driver, or set CUDA_VISIBLE_DEVICES= for the CPU")
        return torch.device("cpu")
    device, width = torch.device("cuda", local_rank), config.n_embd // config.n_head
    gpus = torch.cuda.device_count()
    if local_rank >= gpus or torch.cuda.get_device_capability(device) < (8, 0) or width % 8 or width > 256:
        fail("flash attention in bf16 needs a GPU of compute capability 8.0 for every process (there are "
             f"{gpus}) and heads of a multiple of 8, at most 256 (not {width}): change them, or set "
             "CUDA_VISIBLE_DEVICES= for the CPU")
    torch.cuda.set_device(device)
    return device


def join(config):
    """The Ranks of this process, by torchrun's environment. Exits with code 2 where they cannot be."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    values = {name: os.environ.get(name, default) for name, default in names.items()}
    try:
        rank, world_size, local_rank = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not 0 <= rank < world_size or world_size > 1 and not all(values.values()):
            raise ValueError
    except ValueError:
        fail(f"{values} are torchrun's to set: start with torchrun, or unset them")
    groups = math.gcd(world_size, config.trajectories)
    size = world_size // groups
    if not can_share(config, world_size):
        fail(f"steps of {batch_sizes(config)} sequences (batch_tokens, batch_tokens_ends) cannot be shared "
             f"equally by {size} ranks for a trajectory: start {processes(config, world_size)} processes")
    ranks = Ranks(rank, world_size, pick_device(config, local_rank), groups,
                  list(range(rank // size, config.trajectories, groups)), rank % size, size)
    if world_size > 1:
        nccl, gloo = dict(backend="nccl", device_id=ranks.device), dict(backend="gloo")
        dist.init_process_group(**nccl if ranks.device.type == "cuda" else gloo, timeout=JOIN_TIMEOUT)
        ranks.group, _ = dist.new_subgroups(size, timeout=GROUP_TIMEOUT)
        ranks.world = dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT)
        dist.distributed_c10d._set_pg_timeout(timedelta(days=30), ranks.world)      # once all are connected
    return ranks


@contextlib.contextmanager
def stop_request():
    """
    An Event. While entered, SIGTERM, Ctrl-C, SIGUSR1 (SLURM's warning) and SIGHUP (a closed terminal; not
    under nohup) only set it: the step is finished and saved first. One more, a second or more later (torchrun
    passes Ctrl-C on, so that it comes twice), ends the process at once, also where it waits for another rank:
    a thread listens.
    """
    requested, (receiver, sender) = threading.Event(), socket.socketpair()

    def listen():
        first = math.inf
        while number := receiver.recv(1):                           # nothing: the other end is closed
            if time.monotonic() > first + 1:
                os._exit(128 + number[0])
            first = min(first, time.monotonic())
            requested.set()

    sender.setblocking(False)
    wakeup = signal.set_wakeup_fd(sender.fileno())                  # a byte for every signal
    handlers = {number: signal.signal(number, lambda *_: None)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
                if signal.getsignal(number) is not signal.SIG_IGN}
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()


@script
def main(argv=None):
    config, _ = from_args(argv, __doc__)
    RunDirectory(config, None)
    print(processes(config))


if __name__ == "__main__":
    main()
