"""
Where a micro-batch of train.py and distill.py goes, kernel by kernel, and what compiling a chunk's loss saves: from the
repository's root on a GPU, PYTHONPATH=. python results/h200/profile_step.py [--name=value ...]
(profile.txt was printed before the loss was compiled as a whole, with chunks of 2 ** 28 bytes; what is printed now has it.)
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
    print(f"{name}: {ms:.1f} ms, launched within {launched:.0f}", f"{1e3 * tokens / ms:,.0f} tokens/s" if tokens else "",
          flush=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        function()
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90), flush=True)


def main():
    config, _ = from_args(["configs/1p8b.py", "--train_tokens=4000000", "--fitness_tokens=100000", "--batch_tokens=16384",
                        "--batch_tokens_ends=16384", *sys.argv[1:]], __doc__)
    ours, batch = bench.Ours(config, chain=True), bench.random_batches(config, config.micro_batch)[0]
    tokens = batch[:, 1:].numel()
    show("labels, a micro-batch", lambda: train.label_loss(ours.model, batch).backward(), tokens)
    show("chain, a micro-batch", lambda: ours.loss_fn(ours.model, batch).backward(), tokens)
    show("optimizer", lambda: ours.optimizer.step(1.0, 1.0))
    x, targets = (torch.randn(1, 4096, config.n_embd, device="cuda", dtype=torch.bfloat16, requires_grad=True),
                  torch.randint(config.vocab_size, (1, 4096), device="cuda"))
    for kind, capped_loss in (("eager", module.capped_loss), ("compiled", torch.compile(module.capped_loss, dynamic=False))):
        ours.model.capped_loss = capped_loss
        kl = lambda z, states: distill.distillation_kl(z, ours.model.logits(states).detach(), 1.2)
        both = lambda z, y, states: 0.55 * module.cross_entropy(z, y) + 0.45 * kl(z, states)
        for name, loss in (
                ("labels", functools.partial(ours.model.head_loss, x, targets)),
                ("chain", functools.partial(ours.model.head_loss, x, targets, both, x.detach().flatten(0, 1)))):
            with torch.autocast("cuda", torch.bfloat16):
                print(f"head of 4,096 tokens, {name}, {kind}: {milliseconds(lambda: loss().backward()):.1f} ms", flush=True)


if __name__ == "__main__":
    main()
