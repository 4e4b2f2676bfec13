"""
How time and memory grow: python results/growth.py > results/growth.md         (a quarter of an hour on two cores)
Each curve changes one size of configs/tiny.py, steps train.py's own step (as tools/bench.py does) and prints what it took,
beside the slope that the arithmetic expects: 1 where twice the size should take twice as much, 0 where it should not matter.
"""
import math
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prior                                                                                            # noqa: E402
from config import from_args                                                                            # noqa: E402
from results.demo import commit                                                                         # noqa: E402
from tools.bench import Ours, extra_memory, log_probabilities, random_rows, timed                       # noqa: E402
from world import keep_freed_memory                                                                     # noqa: E402

ROUNDS = 5


def tiny(vocab_size=None, **sizes):
    config = from_args([str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in sizes.items())], __doc__)
    config.vocab_size = vocab_size or config.vocab_size         # a model alone may have any
    return config


def seconds_of_step(config, group=None, ranks=1):
    ours, rows = Ours(config, False, None, group), random_rows(config, ranks=ranks)
    return [timed(lambda: ours.step(rows))[0] for _ in range(ROUNDS + 1)][1:]


def slope(sizes, values):
    """Of a straight line between the logarithms at both ends."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def curve(title, sizes, rows, expected):
    """rows: {column: [values]}; expected: {column: slope}."""
    print(f"\n## {title}\n\n| | {' | '.join(rows)} |\n|---|{'---|' * len(rows)}")
    for i, size in enumerate(sizes):
        print(f"| {size:,} | {' | '.join(f'{values[i]:.4g}' for values in rows.values())} |")
    print(f"| slope measured | {' | '.join(f'{slope(sizes, values):.2f}' for values in rows.values())} |")
    print(f"| slope expected | {' | '.join(expected)} |", flush=True)


def steps_and_memory(title, sizes, config_of, *expected):
    configs = [config_of(size) for size in sizes]
    curve(title, sizes, {"seconds a step": [statistics.median(seconds_of_step(c)) for c in configs],
                         "GiB of a micro-batch": [extra_memory(Ours, False, c, None) for c in configs]}, expected)


def fits(sizes):
    rows = {"seconds of the fit": [], "MB of scores": [], "MB of members": []}
    config = tiny()
    member = 2 * sum(p.numel() for p in Ours(config, False, None).model.parameters()) / 1e6
    for members in sizes:
        log_p = log_probabilities(members, 32_768)
        rows["seconds of the fit"].append(statistics.median(timed(lambda: prior.fit_weights(log_p))[0] for _ in range(3)))
        rows["MB of scores"].append(log_p.numel() * 4 / 1e6)
        rows["MB of members"].append(members * member)
    curve("Members (32,768 fitness tokens)", sizes, rows,
          ["1 to 2: a pass over the scores is linear, Newton's step on those with weight is not", "1", "1"])


def checkpointing():
    print("\n## Loops, and what checkpointing them costs\n\n"
          "| repeats of layers 2 and 3 | checkpoint | seconds a step | GiB of a micro-batch |\n|---|---|---|---|")
    for extra in (0, 2, 6):
        for checkpoint in (False, True)[:1 + bool(extra)]:
            config = tiny(loop_start=2, loop_end=4, loop_extra=extra, checkpoint=checkpoint, micro_batch=32, batch_tokens=4096)
            print(f"| {extra} | {checkpoint} | {statistics.median(seconds_of_step(config)):.4g} | "
                  f"{extra_memory(Ours, False, config, None):.4g} |", flush=True)


def bytes_on_loopback():
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def shared_step(rank, size, folder):
    """One process of `size`: bytes that all of them sent per step, and its seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    config = tiny(trajectories=1, micro_batch=1)
    ours, rows = Ours(config, False, None, dist.group.WORLD), random_rows(config, ranks=size)
    ours.step(rows)
    ours.step(rows)             # DDP lays its buckets out anew after the first
    dist.barrier()
    before = bytes_on_loopback()
    seconds = [timed(lambda: ours.step(rows))[0] for _ in range(ROUNDS)]
    sent = (bytes_on_loopback() - before) / ROUNDS
    if rank == 0:
        (Path(folder) / "result").write_text(f"{statistics.median(seconds)} {sent}")
    dist.barrier()
    dist.destroy_process_group()


def ranks():
    model = Ours(tiny(), False, None)
    gradients = sum(p.numel() * 4 for p in model.model.parameters())
    muon = sum(p.numel() * 4 for g in model.optimizer.groups if g["kind"] == "muon" for p in g["params"])
    print("\n## Ranks (gloo, one thread each, one trajectory)\n\n"
          "| | seconds a step | MB sent per step, by all | expected |\n|---|---|---|---|")
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(shared_step, (size, folder), nprocs=size)
            seconds, sent = map(float, (Path(folder) / "result").read_text().split())
        # an all-reduce sends 2 (n - 1) times its size in all, a broadcast n - 1 times
        print(f"| {size} | {seconds:.4g} | {sent / 1e6:.4g} | {(size - 1) * (2 * gradients + muon) / 1e6:.4g} |", flush=True)


def main():
    keep_freed_memory()
    print(f"# How the cost grows\n\nPrinted by `python results/growth.py` at commit {commit()}: "
          f"configs/tiny.py with one size changed, medians of {ROUNDS} steps;\n"
          f"torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads. "
          "Memory is the peak beyond weights, gradients and optimizer state.")
    steps_and_memory("Tokens of a step, in micro-batches of 1,024", [1024, 2048, 4096, 8192],
                     lambda n: tiny(batch_tokens=n), "1, less the optimizer's share", "0")
    steps_and_memory("Tokens of a micro-batch", [1024, 2048, 4096, 8192],
                     lambda n: tiny(batch_tokens=8192, micro_batch=n // 128), "0", "1")
    steps_and_memory("Length of a sequence, 4,096 tokens a step", [128, 256, 512, 1024],
                     lambda n: tiny(sequence_len=n, batch_tokens=4096, micro_batch=4096 // n),
                     "0, to 1 where attention leads", "0: no mask or score is kept for all heads")
    steps_and_memory("Layers", [2, 4, 8, 16], lambda n: tiny(n_layer=n), "1, less head and MTP", "1, less the same")
    steps_and_memory("Vocabulary", [257, 1028, 4112, 16448], lambda n: tiny(vocab_size=n),
                     "1 where the head leads", "1 in the head's own gradient; logits are of one chunk")
    fits([60, 120, 240, 480])
    checkpointing()
    ranks()


if __name__ == "__main__":
    main()
