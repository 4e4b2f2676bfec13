"""
The exact fit beside the public script's 300 AdamW steps: python -m tools.bench [--members=480] [--tokens=131072] [--rounds=7]
Times both on the same log-probabilities, one after the other, and prints ratios with their spread, gaps and peak memory.
Members of one population are alike: each token has a common part and a smaller part of each member's own.
"""
import resource
import statistics
import time

import torch

from config import refuse, take_actions
from prior import fit_weights
from tests.parity import adamw300


def log_probabilities(members, tokens):
    """(members, tokens) float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(tokens, generator=generator) * 1.5 - 3
    handicap = torch.linspace(0, 0.25, members)[torch.randperm(members, generator=generator)]
    log_p = 0.6 * torch.randn(members, tokens, generator=generator)
    return log_p.add_(base).sub_(handicap[:, None]).clamp_(max=-1e-3)


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def main(argv=None):
    options, rest = take_actions(argv, members=480, tokens=131072, rounds=7)
    if rest or min(vars(options).values()) < 1:
        refuse(f"bench wants --members, --tokens and --rounds of at least 1, not {' '.join(rest) or vars(options)}")
    log_p = log_probabilities(options.members, options.tokens)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    before, ours, theirs = peak(), [], []
    for i in range(options.rounds):
        seconds, (w, gap) = timed(lambda: fit_weights(log_p))
        ours.append(seconds)
        if i == 0:
            print(f"memory beyond the {log_p.nbytes / 2 ** 30:.2f} GiB of log_p: ours {peak() - before:.2f} GiB at its peak")
        seconds, v = timed(lambda: adamw300(log_p.exp()))
        theirs.append(seconds)
    loss = lambda w: -(w @ log_p.double().exp()).log().mean().item()
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"{options.members} members x {options.tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"exact fit: {min(ours):.2f} .. {max(ours):.2f} s, gap {gap:.1e} nats, {(w > 0).sum()} members with weight")
    print(f"300 AdamW steps: {min(theirs):.2f} .. {max(theirs):.2f} s, {loss(v) - loss(w):.1e} nats above it")
    print(f"AdamW / exact: median {statistics.median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}, over {options.rounds} rounds")


if __name__ == "__main__":
    main()
