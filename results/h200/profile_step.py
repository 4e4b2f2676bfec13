"""
Where a micro-batch of train.py and distill.py goes, kernel by kernel, and what compiling a chunk's loss
saves: from the repository's root on a GPU, PYTHONPATH=. python results/h200/profile_step.py [--name=value
...]
(profile.txt was printed before the loss was compiled as a whole, with chunks of 2 ** 28 bytes; what is
printed now has it.)
"""
import functools
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

import distill
import model as module
import train
from infra.config import from_args
from tools import bench


def milliseconds(function, rounds=5):
    def once():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(), function(), end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    return statistics.median([once() for _ in range(rounds + 2)][2:])


def show(name, function, tokens=0):
    ms = milliseconds(function)
    began = time.perf_counter()
    function()
    launched = 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    speed = f"{1e3 * tokens / ms:,.0f} tokens/s" if tokens else ""
    print(f"{name}: {ms:.1f} ms, launched within {launched:.0f}", speed, flush=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        function()
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90), flush=True)


def main():
    config, _ = from_args(["configs/1p8b.py", *sys.argv[1:]], __doc__)
    ours, batch = bench.Ours(config, chain=True), bench.random_batches(config, config.micro_batch)[0]
    tokens = batch[:, 1:].numel()
    show("labels, a micro-batch", lambda: train.label_loss(ours.model, batch).backward(), tokens)
    show("chain, a micro-batch", lambda: ours.loss_fn(ours.model, batch).backward(), tokens)
    show("optimizer", lambda: ours.optimizer.step(1.0, 1.0))
    x = torch.randn(1, 4096, config.n_embd, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(config.vocab_size, (1, 4096), device="cuda")

    def both(z, y, states):
        kl = distill.distillation_kl(z, ours.model.logits(states).detach(), 1.2)
        return 0.55 * module.cross_entropy(z, y) + 0.45 * kl

    eager = module.capped_loss
    for kind, capped_loss in (("eager", eager), ("compiled", torch.compile(eager, dynamic=False))):
        ours.model.capped_loss = capped_loss
        labels = functools.partial(ours.model.head_loss, x, targets)
        chain = functools.partial(ours.model.head_loss, x, targets, both, x.detach().flatten(0, 1))
        for name, loss in (("labels", labels), ("chain", chain)):
            with torch.autocast("cuda", torch.bfloat16):
                ms = milliseconds(lambda: loss().backward())
            print(f"head of 4,096 tokens, {name}, {kind}: {ms:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
