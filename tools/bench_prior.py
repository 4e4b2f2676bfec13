"""
What prior.py's computations cost, on made-up scores of members that are alike along five trajectories; a step
of tools.bench: python -m tools.bench CONFIG --steps=prior [--members=480] [--tokens=131072]
[--stored=131072] [--rounds=5]
Prints for M = 30, 60, ... members the exact fit beside the public script's 300 AdamW steps, the answers of
all rules for every K, the mixture after each cycle; then the pass over --stored tokens of scores on disk (4
bytes a token and member, in the folder for temporary files) that reports the losses of all these mixtures.
"""
import math
import re
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import prior
from infra.files import read_tensors, write_tensors
from tests.parity import adamw300

TRAJECTORIES = 5


def log_probabilities(members, tokens):
    """
    Of each member (tokens,) float32, trajectory by trajectory: every token has a part common to all, one of
    the trajectory, one that changes slowly from cycle to cycle, and one of the member alone; later members
    are better.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(scale):
        return scale * torch.randn(tokens, generator=generator)

    common = noise(1.5) - 3
    for i in range(members):
        cycle = i % math.ceil(members / TRAJECTORIES)
        if cycle == 0:
            own, slow = noise(0.4), noise(0.4)
        slow = 0.9 * slow + noise(0.4 * (1 - 0.9 ** 2) ** 0.5)
        yield (common + own + slow + noise(0.15) - 0.5 * math.exp(-cycle / 12)).clamp_(max=-1e-3)


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def bench_fit(members, tokens, rounds):
    log_p, ours, ratios = torch.stack([*log_probabilities(members, tokens)]), [], []
    for _ in range(rounds):
        seconds, (w, gap) = timed(lambda: prior.fit_weights(log_p))
        theirs, v = timed(lambda: adamw300(log_p.exp()))
        ours, ratios = [*ours, seconds], [*ratios, theirs / seconds]
    p = prior.probabilities(log_p)
    above = ((w @ p).log().mean() - (v.double() @ p).log().mean()).item()
    print(f"{members:>4} members: fit {spread(ours)} s, gap {gap:.0e}, {(w > 0).sum()} with weight; 300 "
          f"AdamW steps take {spread(ratios)} times as long and end {above:.1e} nats above", flush=True)
    del p
    answers, _ = timed(lambda: prior.answers_for(log_p))
    of = [divmod(i, math.ceil(members / TRAJECTORIES)) for i in range(members)]
    growing, grown = timed(lambda: prior.growing(of, log_p))
    print(f"     answers of all rules for every K {answers:.1f} s, the mixture after each of {len(grown)} "
          f"cycles {growing:.1f} s", flush=True)


def peak_while(function):
    """(its result, peak GiB of what is not mapped from disk, looked at ten times a second); nan: no /proc."""
    peak, done, status = [math.nan], threading.Event(), Path("/proc/self/status")

    def watch():
        while status.exists():
            peak[0] = max(int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) / 2 ** 20, peak[0])
            if done.wait(0.1):
                return
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    result = function()
    done.set()
    thread.join()
    return result, peak[0]


def bench_report(members, tokens):
    """One pass over scores on disk, in blocks: as many mixtures as prior.py reports."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(members)]
        for path, row in zip(paths, log_probabilities(members, tokens)):
            write_tensors(path, "val scores", {"log_p": row})
        log_p = [read_tensors(path, "val scores", check=False)[0]["log_p"].numpy() for path in paths]
        W = torch.rand(4 * members, members, dtype=torch.float64)
        mixtures = [(torch.arange(members), w / w.sum()) for w in W]
        token_bytes, documents = np.ones(tokens, np.uint8), np.arange(tokens) // 1000
        reading, _ = timed(lambda: sum(row[i:i + prior.BLOCK].max() for i in range(0, tokens, prior.BLOCK)
                                       for row in log_p))
        (seconds, _), gib = peak_while(lambda: timed(
            lambda: prior.mixture_losses(mixtures, log_p, token_bytes, documents)))
    print(f"losses of {len(mixtures)} mixtures of {members} members on {tokens} stored tokens: {seconds:.1f} "
          f"s, {gib:.1f} GiB beside what is mapped; reading alone {reading:.1f} s")


def bench(options):
    print(f"\nprior: {options.tokens} tokens")
    for members in sorted({m for m in (30, 60, 120, 240, 480) if m < options.members} | {options.members}):
        bench_fit(members, options.tokens, options.rounds)
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20             # bytes there, KiB here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"peak memory of the process: {peak:.1f} GiB")
    bench_report(options.members, options.stored)
