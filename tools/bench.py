"""
Times what is really run: python -m tools.bench CONFIG [--name=value ...]
One optimizer step of train.py and of distill.py (its chain; on random tokens, every micro-batch of it), one of scoring, by
part, with tokens/s, the share of the peak that the model FLOPs of tools.plan come to, and peak memory; and the prior's fit.
Under torchrun (with --trajectories=1) the ranks share each step, and what they send is timed alone, too.

Of its own: --rounds=5   --steps=train,distill,score,prior
            --slowrun=FOLDER   a clone of the public repository, stepped beside ours on the same shapes, alternating
                               (on CUDA one after the other)
            --memory=1         the largest micro-batch that fits, ours and (with --slowrun) theirs; on CUDA
            --peak_tflops=989  on CUDA; on the CPU the peak is that of its own matrix product, measured here
            --members=480  --tokens=131072   (of the fit)
"""
import contextlib
import functools
import gc
import math
import re
import resource
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import current_flash_attention_impl

from data import loader
import distill
from infra.config import from_args
from infra.console import fail, script
from infra.distributed import join, micro_batch_size
from model import GPT, attend
from optim import MuonAdamW
from tools import bench_prior, plan
import train

OPTIONS = dict(rounds=5, steps="train,distill,score,prior", slowrun="", memory=0, peak_tflops=989.0, members=480, tokens=131072)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function):
    wait()
    began = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - began, result


def spread(values, digits=3):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


# ------------------------------------------------------------------------------------------------ ours

class Ours:
    """
    A model as train.py makes it, and one optimizer step of train.py or distill.py on random tokens,
    shared by the ranks of a group.
    """

    def __init__(self, config, chain, options, ranks=None, one_graph=False):
        torch.manual_seed(config.seed)
        self.config, self.model = config, GPT(config).init_weights().to_device(DEVICE, config.compile)
        self.group = group = ranks and ranks.group
        if one_graph:
            self.model.hidden = torch.compile(self.model.hidden, dynamic=False)
        self.optimizer = MuonAdamW(self.model.named_parameters(), config.lr_scale, group)
        self.ddp_model = train.distributed(self.model, ranks) if ranks else self.model
        tokens = np.random.default_rng(0).integers(
            config.vocab_size, size=config.train_tokens - config.fitness_tokens, dtype=np.uint16)
        data = types.SimpleNamespace(train=tokens, doc_starts=np.arange(0, len(tokens), 1000),
                                     sequences_per_epoch=loader.sequences_per_epoch(config, len(tokens)))
        self.batches = loader.Batches(data, config.sequence_len, config.seed)
        self.loss_fn = train.label_loss
        if chain:
            teacher = distill.frozen_model(config, DEVICE).init_weights()
            self.loss_fn = lambda model, batch: distill.distilled_loss(
                model, [(teacher, 1.0)], batch, config.distill_alpha, config.distill_temperature)

    def step(self, rows):
        micro_batches = rows.split(micro_batch_size(self.config, len(rows), 1))
        train.train_step(self.ddp_model, self.optimizer, micro_batches, self.loss_fn, (1.0, 1.0))

    def parts(self, rows):
        """Seconds of the parts of a step over one micro-batch, of its optimizer step, and of the batch's way from the data."""
        batch = rows[:self.config.micro_batch]
        self.model.zero_grad(set_to_none=False)
        data, _ = timed(lambda: self.batches.take(len(rows)))
        hidden, x = timed(lambda: self.model.hidden(batch[:, :-1]))
        x = x.detach().requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):        # as within forward()
            head, _ = timed(lambda: self.model.head_loss(x, batch[:, 1:]))
        forward, loss = timed(lambda: self.loss_fn(self.model, batch))
        backward, _ = timed(loss.backward)
        sent = {"communication, alone, of the step": timed(self.communicate)[0]} if self.group else {}
        clip, _ = timed(lambda: torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        step, _ = timed(lambda: self.optimizer.step(1.0, 1.0))
        return {"data, of the step": data, "hidden states": hidden, "loss head (labels)": head,
                "MTP and teacher": forward - hidden - head, "backward": backward,
                "clip and optimizer, of the step": clip + step, **sent}

    def communicate(self):
        """What a step sends, and nothing else: the gradients to all, each Muon matrix from the rank that stepped it."""
        for p in self.model.parameters():
            dist.all_reduce(p.grad, group=self.group)
        for g in self.optimizer.groups:
            for i, p in enumerate(g["params"] if g["kind"] == "muon" else []):
                dist.broadcast(p.detach(), group=self.group, group_src=i % self.optimizer.size)


# ---------------------------------------------------------------------------------------------- theirs

def load_slowrun(folder, honest):
    """
    The public script as a module: what it imports and parses at import is stood in for. honest: its attention is ours,
    and, on a CPU, its Muon float32, as ours is there.
    """
    path = Path(folder) / "unlimited" / "train.py"
    if not path.exists():
        fail(f"slowrun={folder}: has no unlimited/train.py; name a clone of the NanoGPT Slowrun's repository")
    source, module = path.read_text(), types.ModuleType("slowrun")
    if honest and DEVICE.type == "cpu":
        source = source.replace("X = g.bfloat16()", "X = g.float()")
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    argv, sys.argv, sys.modules["slowrun"] = sys.argv, [str(path)], module
    sys.path.insert(0, str(path.parent))
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        sys.argv = argv
        sys.path.remove(str(path.parent))
    if honest:
        module.flash_attn.flash_attn_func = lambda q, k, v, causal, window_size: attend(
            q, k, v, window_size[0] if 0 <= window_size[0] < q.size(1) else None)
    return module


class Theirs:
    """The public script's model and optimizer, stepped as its loop steps them."""

    def __init__(self, config, chain, options, honest):
        script = load_slowrun(options.slowrun, honest)
        shape = script.GPTConfig(
            **{k: getattr(config, k) for k in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "window_pattern",
                                               "dropout", "mtp_weight")},
            n_kv_head=config.n_head, use_iha=config.iha)
        models = []
        for _ in range(1 + chain):
            model = script.GPT(shape).to(DEVICE)
            model.init_weights()
            if config.loop_extra:
                model.set_dupe_layers(config.loop_start, config.loop_end)
            models.append(model)
        self.config, self.raw, self.model = config, models[0], models[0]
        self.optimizer = self.raw.setup_optimizer(dict(
            matrix_lr=0.01, scalar_lr=0.025, embedding_lr=0.04, unembedding_lr=0.0005,
            weight_decay=1.3, adam_betas=(0.8, 0.95), iha_lr=0.02))
        self.teacher = models[1].eval().requires_grad_(False).forward_logits if chain else None
        if chain and DEVICE.type == "cuda":
            models[1].bfloat16()
        if config.compile and DEVICE.type == "cuda":
            self.model = torch.compile(self.raw, dynamic=False)
            self.teacher = chain and torch.compile(self.teacher, dynamic=False)
        self.autocast = (contextlib.nullcontext() if honest and DEVICE.type == "cpu" else
                         torch.autocast(DEVICE.type, torch.bfloat16))

    def loss(self, batch):
        x, y, c = batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), self.config
        if not self.teacher:
            with self.autocast:
                return self.model(x, y)
        with self.autocast:
            student, mtp = self.model(x, y, distill=True)
            with torch.no_grad():
                teacher = self.teacher(x)
        student, teacher = student.flatten(0, 1).float(), teacher.flatten(0, 1).float()
        student_log_p, teacher_log_p = (F.log_softmax(z / c.distill_temperature, dim=-1) for z in (student, teacher))
        kl = F.kl_div(student_log_p, teacher_log_p, reduction="batchmean", log_target=True) * c.distill_temperature ** 2
        return (1 - c.distill_alpha) * (F.cross_entropy(student, y.flatten()) + c.mtp_weight * mtp) + c.distill_alpha * kl

    def step(self, rows):
        batches = rows.split(self.config.micro_batch)
        for batch in batches:
            (self.loss(batch) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.raw.parameters(), 1.0)
        self.optimizer.step()
        self.raw.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------ measurements

def random_rows(config, tokens=None, ranks=1):
    n = (tokens or config.batch_tokens // ranks) // config.sequence_len
    return torch.randint(config.vocab_size, (n, config.sequence_len + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def peak_flops(options):
    """The device's: as given on CUDA, on the CPU what a large float32 matrix product reaches here."""
    if DEVICE.type == "cuda":
        return options.peak_tflops * 1e12
    a = torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / min(timed(lambda: a @ a)[0] for _ in range(5))


def free_memory():
    """Of what nothing refers to any more but itself, as compiled blocks do."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def extra_memory(kind, chain, config, options):
    """
    Peak GiB of two steps beyond weights, gradients and optimizer state (and the teacher's weights). On the CPU in a process
    of its own; on CUDA by the allocator.
    """
    if DEVICE.type == "cuda":
        free_memory()
        return allocated(kind(config, chain, options), random_rows(config, config.micro_batch * config.sequence_len))
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(resident, kind, chain, config, options).result()


def allocated(runner, rows):
    """
    Of a step on CUDA: peak GiB beyond what stays and the gradients, which are there all the time,
    as with several micro-batches.
    """
    runner.step(rows)
    for p in runner.model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.step(rows)
    return (torch.cuda.max_memory_allocated() - kept) / plan.GIB


def resident(kind, chain, config, options):
    """Growth of the process's peak of memory over two steps, less gradients and optimizer state."""
    runner, rows = kind(config, chain, options), random_rows(config, config.micro_batch * config.sequence_len)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(2):
        runner.step(rows)
    # ru_maxrss would be the parent's
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    ours = Ours(config, False, options)
    made = 4 * sum(p.numel() for p in ours.model.parameters())
    if kind is not Ours:                    # theirs makes its state with the first step, ours before it
        made += sum(t.numel() * t.element_size() for pair in ours.optimizer.moments().values() for t in pair)
    return (peak - before - made) / plan.GIB


def kinds(config, options):
    """name -> constructor of what is compared."""
    rows = {"ours": Ours}
    if DEVICE.type == "cuda" and config.compile and not config.loop_extra:          # not what train.py runs: whether it should
        rows["ours, all layers one graph"] = functools.partial(Ours, one_graph=True)
    if options.slowrun:
        rows["theirs as it is"] = functools.partial(Theirs, honest=False)
        precision = ", fp32" if DEVICE.type == "cpu" else ""
        rows[f"theirs, our attention{precision}"] = functools.partial(Theirs, honest=True)
    return rows


def bench_step(name, chain, config, options, peak, ranks):
    """One table: seconds of a step, tokens/s, share of the peak of all ranks, ratios to ours, memory."""
    rows, compared = random_rows(config, ranks=ranks.group_size), kinds(config, options)
    if ranks.world_size > 1:
        compared = {"ours": functools.partial(Ours, ranks=ranks)}
    peak, model = peak * ranks.group_size, plan.meta_model(config)
    flops = plan.step_flops(model, True, chain) * config.batch_tokens
    seconds = {kind: [] for kind in compared}
    say = print if ranks.rank == 0 else lambda *words, **options: None
    say(f"\n{name} step: {config.batch_tokens:,} tokens in micro-batches of {config.micro_batch} x {config.sequence_len}")
    # a GPU may not hold both: one after the other there
    for side in [[kind] for kind in compared] if DEVICE.type == "cuda" else [list(compared)]:
        runners = {kind: compared[kind](config, chain, options) for kind in side}
        for i in range(options.rounds + 1):                 # the first warms up
            for kind in side:
                took, _ = timed(lambda: runners[kind].step(rows))
                if i:
                    seconds[kind].append(took)
        if "ours" in runners:
            parts = [runners["ours"].parts(rows) for _ in range(options.rounds + 1)][1:]
        for kind in side:
            took, memory = seconds[kind], ""
            if DEVICE.type == "cuda":
                memory = (f", {allocated(runners[kind], rows[:config.micro_batch]):.2f} GiB beyond weights, gradients "
                          f"and state ({torch.cuda.max_memory_allocated() / plan.GIB:.1f} in all)")
            elif ranks.world_size == 1:
                memory = f", {extra_memory(compared[kind], chain, config, options):.2f} GiB beyond weights, gradients and state"
            ratio = "" if kind == "ours" else f", {spread([b / a for a, b in zip(seconds['ours'], took)], 2)} times ours"
            say(f"  {kind}: {spread(took)} s, {config.batch_tokens / statistics.median(took):,.0f} tokens/s, "
                f"{flops / statistics.median(took) / peak:.1%} of the peak{memory}{ratio}", flush=True)
        runners.clear()
        free_memory()
    say("  parts of ours, of one micro-batch where nothing else is said:")
    for part in parts[0]:
        say(f"    {part}: {spread([p[part] for p in parts], 4)} s")


def bench_score(config, options, peak):
    model, rows = GPT(config).init_weights().to_device(DEVICE, config.compile), random_rows(config).cpu().numpy()
    seconds = [timed(lambda: loader.score(model, rows, config.micro_batch))[0] for _ in range(options.rounds + 1)][1:]
    flops = sum(plan.forward_flops(plan.meta_model(config), True, mtp=False).values()) * config.batch_tokens
    print(f"\nscoring: {spread(seconds)} s, {config.batch_tokens / statistics.median(seconds):,.0f} tokens/s, "
          f"{flops / statistics.median(seconds) / peak:.1%} of the peak")


def bench_memory(config, options):
    """The largest micro-batch, by doubling, that takes a step; ours and theirs, without and with a teacher."""
    for chain in (False, True):
        for name, make in kinds(config, options).items():
            fits, size, gib = 0, 1, math.nan
            while size <= 64:
                try:
                    config.micro_batch = size
                    gib = extra_memory(make, chain, config, options)
                    fits, size = size, size * 2
                except torch.OutOfMemoryError:
                    break
            print(f"largest micro-batch, {'with' if chain else 'without'} a teacher, {name}: {fits}, "
                  f"{gib:.1f} GiB beyond weights, gradients and state")


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    steps = options.steps.split(",")
    if not set(steps) <= {"train", "distill", "score", "prior"} or min(options.rounds, options.members, options.tokens) < 1:
        fail("bench wants --steps of train, distill, score, prior and --rounds, --members, --tokens of 1 or more, "
               f"not {vars(options)}")
    if options.memory and DEVICE.type != "cuda":
        fail("memory=1 looks for the largest micro-batch of a GPU, and there is none here; leave it out")
    ranks = join(config)
    if ranks.world_size > 1 and (ranks.groups > 1 or options.slowrun or options.memory or not set(steps) <= {"train", "distill"}):
        fail("under torchrun bench takes --trajectories=1 and --steps=train,distill, without --slowrun and --memory")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    if ranks.rank == 0:
        print(f"{device}, {ranks.world_size} ranks, {torch.get_num_threads()} threads, torch {torch.__version__}, "
              f"{current_flash_attention_impl() or 'FA2'} where it is CUDA, compile={config.compile and DEVICE.type == 'cuda'}; "
              f"medians over {options.rounds} rounds, and their range")
    peak = peak_flops(options)
    if ranks.rank == 0:
        print(f"peak: {peak / 1e12:.3g} TFLOPS; {config.n_layer} layers x {config.n_embd}, vocabulary {config.vocab_size}")
    for name in steps:
        if name in ("train", "distill"):
            bench_step(name, name == "distill", config, options, peak, ranks)
        elif name == "score":
            bench_score(config, options, peak)
        else:
            bench_prior.bench(options)
    if options.memory:
        bench_memory(config, options)
    ranks.leave()


if __name__ == "__main__":
    main()
