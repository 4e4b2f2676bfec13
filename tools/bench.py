"""
Times what is really run: python -m tools.bench CONFIG [--name=value ...]
One optimizer step of train.py and one of distill.py's chain (on random tokens, every micro-batch of it) and
one batch of scoring: seconds, tokens/s, the share of the peak that tools.plan's model FLOPs come to, peak
memory, a step's parts. And the prior's fit (tools/bench_prior.py). Under torchrun (with --trajectories=1) the
ranks share each step, and what they send is timed alone, too.

Of its own: --rounds=5   --steps=train,distill,score,prior
            --slowrun=FOLDER   a clone of the public repository, stepped beside ours on the same shapes,
                               alternating (on CUDA one after the other)
            --memory=1         the largest micro-batch that fits, ours and (with --slowrun) theirs; on CUDA
            --peak_tflops=989  on CUDA; on the CPU the peak is its own matrix product's, measured here
            --members=480  --tokens=131072   (of the prior's fit)  --stored=131072   (of its pass over disk)
"""
import contextlib
import functools
import gc
import math
import re
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import current_flash_attention_impl

import distill
import train
from data import loader
from infra.config import from_args
from infra.console import fail, print0, script
from infra.distributed import join, micro_batch_size
from model import GPT
from optim import MuonAdamW
from tools import bench_prior, plan
from tools.bench_slowrun import Theirs

OPTIONS = dict(rounds=5, steps="train,distill,score,prior", slowrun="", memory=0, peak_tflops=989.0,
               members=480, tokens=131072, stored=131072)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"


def timed(function, *args):
    """(seconds, result) of a call."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*args)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def spread(values, digits=3):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def random_batches(config, sequences):
    """So many random sequences, in micro-batches as train.py cuts them, each (B, T + 1)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (sequences, config.sequence_len + 1), generator=generator)
    return rows.to(DEVICE).split(micro_batch_size(config, sequences, 1))


# --------------------------------------------------------------------------------- what is compared

class Ours:
    """A model as train.py makes it, and its step on labels or against a teacher, shared by the ranks."""

    def __init__(self, config, chain, ranks=None, one_graph=False):
        torch.manual_seed(config.seed)
        self.model = GPT(config).init_weights().to_device(DEVICE, config.compile)
        if one_graph:
            self.model.hidden = torch.compile(self.model.hidden, dynamic=False)
        self.group = ranks and ranks.group
        self.optimizer = MuonAdamW(self.model.named_parameters(), config.lr_scale, self.group)
        self.ddp_model = train.distributed(self.model, ranks) if ranks else self.model
        self.loss_fn = train.label_loss
        if chain:
            teachers = [(distill.frozen_model(config, DEVICE).init_weights(), 1.0)]
            self.loss_fn = lambda model, batch: distill.distilled_loss(
                model, teachers, batch, config.distill_alpha, config.distill_temperature)

    def step(self, micro_batches):
        train.train_step(self.ddp_model, self.optimizer, micro_batches, self.loss_fn, (1.0, 1.0))

    def parts(self, batch):
        """Seconds of the parts of a step: of one micro-batch, of the exchange, of the optimizer."""
        self.model.zero_grad(set_to_none=False)
        forward, loss = timed(self.loss_fn, self.model, batch)
        backward, _ = timed(loss.backward)
        sent = {"communication, alone, of the step": timed(self.communicate)[0]} if self.group else {}
        clip, _ = timed(torch.nn.utils.clip_grad_norm_, self.model.parameters(), 1.0)
        step, _ = timed(self.optimizer.step, 1.0, 1.0)
        return {"forward": forward, "backward": backward, **sent,
                "clip and optimizer, of the step": clip + step}

    def communicate(self):
        """What a step sends: all gradients, and each Muon matrix from the rank that stepped it."""
        for p in self.model.parameters():
            dist.all_reduce(p.grad, group=self.group)
        for g in self.optimizer.groups:
            for i, p in enumerate(g["params"] if g["kind"] == "muon" else []):
                dist.broadcast(p.detach(), group=self.group, group_src=i % self.optimizer.size)

    def state_made_by_steps(self):
        return 0                            # bytes: it is made with the optimizer


def kinds(config, slowrun, ranks=None):
    """name -> constructor, of (config, chain), of what is compared."""
    if ranks and ranks.world_size > 1:
        return {"ours": functools.partial(Ours, ranks=ranks)}
    rows = {"ours": Ours}
    if CUDA and config.compile and not config.loop_extra:       # not what train.py runs: whether it should
        rows["ours, all layers one graph"] = functools.partial(Ours, one_graph=True)
    if slowrun:
        rows["theirs as it is"] = functools.partial(Theirs, slowrun, False, DEVICE)
        honest = "theirs, our attention" + ("" if CUDA else ", fp32")
        rows[honest] = functools.partial(Theirs, slowrun, True, DEVICE)
    return rows


# ------------------------------------------------------------------------------------------- memory

def free_memory():
    gc.collect()                            # compiled blocks refer to themselves
    torch.cuda.empty_cache()                # of no effect on a CPU


def extra_memory(kind, chain, config):
    """Peak GiB of a micro-batch's step beyond weights (a teacher's, too), gradients and optimizer state."""
    if CUDA:
        free_memory()
        return allocated(kind(config, chain), random_batches(config, config.micro_batch))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:       # its peak is its own
        return pool.submit(resident, kind, chain, config).result()


def allocated(runner, batches):
    """On CUDA; gradients are there all the time, as with several micro-batches."""
    runner.step(batches[:1])
    for p in runner.model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.step(batches[:1])
    return (torch.cuda.max_memory_allocated() - kept) / plan.GIB


def resident(kind, chain, config):
    """On the CPU: growth of the process's peak over two steps, less gradients and state made in them."""
    runner, batches = kind(config, chain), random_batches(config, config.micro_batch)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(2):
        runner.step(batches)
    # ru_maxrss would be the parent's
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    gradients = 4 * sum(p.numel() for p in runner.model.parameters())
    return (peak - before - gradients - runner.state_made_by_steps()) / plan.GIB


def bench_memory(config, slowrun):
    """The largest micro-batch, by doubling, that takes a step, without and with a teacher."""
    for chain in (False, True):
        for name, kind in kinds(config, slowrun).items():
            fits, gib = 0, math.nan
            with contextlib.suppress(torch.OutOfMemoryError):
                for config.micro_batch in (1, 2, 4, 8, 16, 32, 64):
                    gib = extra_memory(kind, chain, config)
                    fits = config.micro_batch
            print0(f"largest micro-batch, {'with' if chain else 'without'} a teacher, {name}: {fits}, "
                   f"{gib:.1f} GiB beyond weights, gradients and state")


# --------------------------------------------------------------------------------------------- time

def peak_flops(options):
    """The device's: as given on CUDA, on the CPU what a large float32 matrix product reaches here."""
    if CUDA:
        return options.peak_tflops * 1e12
    a = torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / min(timed(torch.mm, a, a)[0] for _ in range(5))


def performance(seconds, tokens, flops, peak):
    """Of `tokens` that take `flops` and so many seconds, round by round."""
    middle = statistics.median(seconds)
    return f"{spread(seconds)} s, {tokens / middle:,.0f} tokens/s, {flops / middle / peak:.1%} of the peak"


def time_steps(runners, batches, rounds):
    """name -> seconds of each round; the runners alternate, one round more warms them up."""
    seconds = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, runner in runners.items():
            seconds[name].append(timed(runner.step, batches)[0])
    return {name: row[1:] for name, row in seconds.items()}


def bench_step(chain, config, options, peak, ranks):
    """One table: a step's time and memory, their ratios to ours, and ours by part."""
    batches = random_batches(config, config.batch_tokens // config.sequence_len // ranks.group_size)
    flops = plan.step_flops(plan.meta_model(config), True, chain) * config.batch_tokens
    print0(f"\n{'distill' if chain else 'train'} step: {config.batch_tokens:,} tokens in micro-batches of "
           f"{len(batches[0])} x {config.sequence_len}")
    compared, ours, parts = kinds(config, options.slowrun, ranks), [], []
    # a GPU may not hold both: one after the other there
    for side in [[name] for name in compared] if CUDA else [list(compared)]:
        runners = {name: compared[name](config, chain) for name in side}
        seconds = time_steps(runners, batches, options.rounds)
        if "ours" in runners:
            ours = seconds["ours"]
            parts = [runners["ours"].parts(batches[0]) for _ in range(options.rounds + 1)][1:]
        for name, row in seconds.items():
            line = f"  {name}: {performance(row, config.batch_tokens, flops, peak * ranks.group_size)}"
            if CUDA:
                line += (f", {allocated(runners[name], batches):.2f} GiB beyond weights, gradients and state "
                         f"({torch.cuda.max_memory_allocated() / plan.GIB:.1f} in all)")
            elif ranks.world_size == 1:
                gib = extra_memory(compared[name], chain, config)
                line += f", {gib:.2f} GiB beyond weights, gradients and state"
            if name != "ours":
                line += f", {spread([b / a for a, b in zip(ours, row)], 2)} times ours"
            print0(line)
        runners.clear()
        free_memory()
    print0("  parts of ours, of one micro-batch where nothing else is said:")
    for part in parts[0]:
        print0(f"    {part}: {spread([p[part] for p in parts], 4)} s")


def bench_score(config, options, peak):
    model = GPT(config).init_weights().to_device(DEVICE, config.compile)
    rows = torch.cat(random_batches(config, config.batch_tokens // config.sequence_len)).cpu().numpy()
    seconds = [timed(loader.score, model, rows, config.micro_batch)[0] for _ in range(options.rounds + 1)]
    flops = sum(plan.forward_flops(plan.meta_model(config), True, mtp=False).values()) * config.batch_tokens
    print0(f"\nscoring: {performance(seconds[1:], config.batch_tokens, flops, peak)}")


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    steps = set(options.steps.split(","))
    whole = min(options.rounds, options.members, options.tokens, options.stored) >= 1
    if not steps <= {"train", "distill", "score", "prior"} or not whole:
        fail("bench wants --steps of train, distill, score, prior and --rounds, --members, --tokens, "
             f"--stored of 1 or more, not {vars(options)}")
    if options.memory and not CUDA:
        fail("memory=1 looks for the largest micro-batch of a GPU, and there is none here; leave it out")
    ranks = join(config)
    alone = options.slowrun or options.memory or not steps <= {"train", "distill"}
    if ranks.world_size > 1 and (ranks.groups > 1 or alone):
        fail("under torchrun bench takes --trajectories=1 and --steps=train,distill, without --slowrun and "
             "--memory")
    peak = peak_flops(options)
    print0(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {ranks.world_size} ranks, "
           f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
           f"{current_flash_attention_impl() or 'FA2'} where it is CUDA, compile={config.compile and CUDA}; "
           f"medians over {options.rounds} rounds, and their range\n"
           f"peak: {peak / 1e12:.3g} TFLOPS; {config.n_layer} layers x {config.n_embd}, "
           f"vocabulary {config.vocab_size}")
    for name in ("train", "distill"):
        if name in steps:
            bench_step(name == "distill", config, options, peak, ranks)
    if "score" in steps:
        bench_score(config, options, peak)
    if "prior" in steps:
        bench_prior.bench(options)
    if options.memory:
        bench_memory(config, options.slowrun)
    ranks.leave()


if __name__ == "__main__":
    main()
