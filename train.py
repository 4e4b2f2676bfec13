"""
Primitive 1, the cyclic schedule (paper, section 3.1): few trajectories, many cycles, one member at the end of
each. Within a cycle the learning rate falls while the weight decay rises; between cycles the weights get
noise.

One process:  python train.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 train.py configs/1p8b.py
Trains the cycles before distill_from (all, where there is no chain) on labels alone, into run_dir:
config.json, metrics.jsonl, per trajectory its members and a checkpoint. Run again, it does only what is
missing; asked to stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) it finishes its step and saves a checkpoint first.
"""
import contextlib
import gc
import math
import time
import warnings
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from data import loader
from infra.config import from_args
from infra.console import FAILED, STOPPED, fail, next_command, print0, progress_bar, script
from infra.distributed import batch_sizes, join, micro_batch_size, stop_request
from infra.run_directory import RunDirectory, check_room, differences, environment
from model import GPT
from optim import MuonAdamW

LR_FLOOR, WD_FLOOR = 0.08, 0.7              # f and g of the paper: the multipliers' lowest values
NOISE_FIRST, NOISE_LAST = 0.25, 0.05        # of a weight's standard deviation, first and last time
EMA_FROM = 0.9                              # where weights are averaged: from this part of a cycle on
WARMDOWN = 5                                # schedule=warmdown: constant, then down to 0 over the last 1/5


# -------------------------------------------------------------------------------------------- the schedule

def rate_multipliers(schedule, step, length):
    """
    (learning rate, weight decay) multipliers at `step` of a decay of `length` steps: cycle (paper, eq. 4),
    the baseline's cosine, record 11's warmdown.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / length)), 1.0
    if schedule == "warmdown":
        return min(1.0, WARMDOWN * (1 - step / length)), 1.0
    lr = LR_FLOOR + (1 - LR_FLOOR) * (1 - step / length)
    return lr, WD_FLOOR + (1 - WD_FLOOR) * (1 - lr) / (1 - LR_FLOOR)


def noise_scale(cycle, cycles):
    """Noise before `cycle` = 1 .. cycles - 1, in standard deviations: half a cosine down (paper, eq. 5)."""
    progress = (cycle - 1) / max(1, cycles - 2)
    return NOISE_LAST + (NOISE_FIRST - NOISE_LAST) * 0.5 * (1 + math.cos(math.pi * progress))


def tokens_per_step(config, cycle):
    """One value in the middle half of the cycles, another in the quarters at both ends."""
    last = config.cycles - 1
    middle = last <= 4 * cycle <= 3 * last
    return config.batch_tokens if middle else config.batch_tokens_ends


class Step(NamedTuple):
    """One optimizer step of a trajectory, known before the first."""
    cycle: int
    first: bool             # of its cycle
    last: bool
    sequences: int          # of its batch, over all ranks
    rates: tuple            # multipliers of learning rate and weight decay
    looping: bool           # whether the looped layers run
    averaging: bool         # whether the weights after it join the average


def schedule(config, sequences_per_epoch):
    """Every Step of a trajectory, in order. Exits with code 2 where a cycle is too short for an average."""
    epoch, steps = sequences_per_epoch * config.sequence_len, []
    lengths = [max(1, round(config.cycle_epochs(cycle) * epoch / tokens_per_step(config, cycle)))
               for cycle in range(config.cycles)]
    total = sum(lengths)
    if config.ema_decay and min(lengths) - 1 - config.ema_every < EMA_FROM * min(lengths):
        fail(f"ema_every={config.ema_every}: the end of a cycle of {min(lengths)} steps holds no two updates "
             "of the average; lower it")
    if total > 10_000_000:
        fail(f"epochs_per_cycle={config.epochs_per_cycle:g} and cycles={config.cycles} make {total:,} steps, "
             "more than 10,000,000")
    for cycle, length in enumerate(lengths):
        sequences = tokens_per_step(config, cycle) // config.sequence_len
        for s in range(length):
            # a decay is a cycle, or with restart=none all of them
            at, span = (len(steps), total) if config.restart == "none" else (s, length)
            ending = s >= EMA_FROM * length and (length - 1 - s) % config.ema_every == 0
            steps.append(Step(cycle, s == 0, s == length - 1, sequences,
                              rates=rate_multipliers(config.schedule, at, span),
                              looping=at >= config.loop_from * span,
                              averaging=config.ema_decay > 0 and ending))
    return steps


def noise_seed(seed, cycle):
    """The public script's formula; restart=fresh draws its new weights from it, too."""
    return seed * 100_003 + cycle * 31_337


@torch.no_grad()
def perturb(model, scale, seed):
    """Gaussian noise of `scale` standard deviations on every parameter, drawn on the CPU: all ranks agree."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.numel() > 1:                       # one number has no deviation
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.add_(noise * (scale * p.float().std()))


# ---------------------------------------------------------------------------------------------- one step

def label_loss(model, batch):
    """Cross-entropy plus the weighted multi-token-prediction loss of tokens (B, T + 1), in nats per token."""
    loss, mtp = model(batch[:, :-1], batch[:, 1:])
    return loss + mtp


def train_step(model, optimizer, micro_batches, loss_fn, rates):
    """
    One optimizer step over this rank's micro-batches, each (B, T + 1), gradients clipped to norm 1;
    loss_fn(model, tokens) in nats per token. Returns (this rank's mean loss, gradient norm before clipping).
    """
    model.zero_grad(set_to_none=False)          # in place: gradients stay what DDP reduces
    total = 0
    for i, batch in enumerate(micro_batches, 1):
        # ranks exchange gradients once, with the last micro-batch
        last = i == len(micro_batches) or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if last else model.no_sync():
            loss = loss_fn(model, batch) / len(micro_batches)
            loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(*rates)
    return total, norm


def seed_dropout(seed, step, rank):
    """Dropout depends on seed, step and rank alone: a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


# ------------------------------------------------------------------------------------------ a trajectory

class Trajectory:
    """One model in training. All that it is after `step` steps is in its checkpoint."""

    def __init__(self, run, t, data, ranks, first_weights):
        self.run, self.t, self.ranks, self.config, self.seed = run, t, ranks, run.config, run.config.seed + t
        torch.manual_seed(self.seed)
        self.model = GPT(self.config).init_weights().to_device(ranks.device, self.config.compile)
        if first_weights:
            self.model.load_state_dict(first_weights)
        self.optimizer = self.new_optimizer()
        self.batches = loader.Batches(data, self.config.sequence_len, self.seed)
        self.step, self.average = 0, {}         # steps done; EMA of the weights: name -> float32

    def new_optimizer(self):
        c = self.config
        return MuonAdamW(self.model.named_parameters(), c.lr_scale, self.ranks.group, c.momentum_warmup)

    def restart(self, cycle):
        """Between two cycles. noise: on the weights, moments stay; fresh: all new; none: nothing."""
        if self.config.restart == "noise":
            perturb(self.model, noise_scale(cycle, self.config.cycles), noise_seed(self.seed, cycle))
        if self.config.restart == "fresh":
            torch.manual_seed(noise_seed(self.seed, cycle))
            self.model.init_weights()
            self.optimizer = self.new_optimizer()

    def update_average(self):
        for name, w in self.model.state_dict().items():
            w = w.float()
            self.average.setdefault(name, w.clone()).lerp_(w, 1 - self.config.ema_decay)

    def use_average(self):
        """At a cycle's end: the member, and the next cycle's start."""
        if self.average:
            self.model.load_state_dict({name: w.float().lerp(self.average[name], self.config.ema_share)
                                        for name, w in self.model.state_dict().items()})
            self.average = {}

    def save_member(self, cycle, fitness_set):
        """At a cycle's end, before the noise. Its loss on the fitness set is logged, to watch a run by."""
        model, c = self.model, self.config
        model.looping = True                    # as whoever uses the member runs it
        if self.ranks.is_main:
            loss = -float(loader.score(model, fitness_set, c.micro_batch).mean())
            self.check_finite(cycle, f"fitness loss {loss}", loss)
            self.run.log(kind="cycle", trajectory=self.t, cycle=cycle, step=self.step, fit_loss=loss)
            self.run.save_member(self.t, cycle, model.state_dict(), fit_loss=loss,
                                 epochs=c.epochs_until(cycle + 1))

    def save_checkpoint(self):
        """All ranks of the group together: each holds a part of the moments."""
        tensors = self.optimizer.state_dict()
        if self.ranks.is_main:
            tensors |= {f"model.{name}": w for name, w in self.model.state_dict().items()}
            tensors |= {f"average.{name}": w for name, w in self.average.items()}
            tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
            self.run.save_checkpoint(self.t, tensors, self.step, environment(self.config, self.ranks))
        self.ranks.barrier()                    # on disk for all of them

    def resume(self, tensors, before, done):
        """From a checkpoint after the steps done, which another environment may have written before."""
        if differ := differences(before, environment(self.config, self.ranks)):
            print0(f"note: trajectory {self.t} resumes in another environment ({differ}): not bit for bit "
                   "what it would have been", self.ranks.is_main)
        model, average = ({name.removeprefix(kind): w for name, w in tensors.items() if name.startswith(kind)}
                          for kind in ("model.", "average."))
        # fresh: every cycle has an optimizer of its own
        updates = sum(self.config.restart != "fresh" or step.cycle == done[-1].cycle for step in done)
        try:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(tensors, updates)
        except (KeyError, RuntimeError, AssertionError) as e:
            if isinstance(e, torch.AcceleratorError | torch.OutOfMemoryError):
                raise
            fail(f"the checkpoint of trajectory {self.t} is of another model: restore it, or delete "
                 f"'{self.run.folder(self.t)}' and train it again")
        self.average = {name: w.to(self.model.device, copy=True) for name, w in average.items()}
        self.step, self.batches.position = len(done), sum(step.sequences for step in done)

    def check_finite(self, cycle, what, value):
        if not math.isfinite(value):
            fail(f"trajectory {self.t}, cycle {cycle}, step {self.step}, sequences up to "
                 f"{self.batches.position - 1} of its order: {what}; what was saved stays: start anew in "
                 "another --run_dir, with a lower --lr_scale or another seed", FAILED)


def distributed(model, ranks):
    """The model whose backward pass averages the gradients over the ranks of a group; itself for one rank."""
    if ranks.group_size == 1:
        return model
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)     # torch 2.13 renames it
    ddp_model = DistributedDataParallel(
        model, process_group=ranks.group, gradient_as_bucket_view=True, broadcast_buffers=False)
    # after a first pass DDP sums in another order: have that behind us, so that a resumed run agrees
    size = micro_batch_size(model.config, max(batch_sizes(model.config)), ranks.group_size)
    tokens = torch.zeros(size, model.config.sequence_len + 1, dtype=torch.int64, device=model.device)
    label_loss(ddp_model, tokens).backward()
    return ddp_model


# --------------------------------------------------------------------------------------------- the loop

def train(trajectory, steps, loss_for_cycle, fitness_set, stop, bar):
    """These steps of a trajectory. Asked to stop, it saves after the step at hand and returns True."""
    config, ranks, t = trajectory.config, trajectory.ranks, trajectory.t
    model, loss_fn = distributed(trajectory.model, ranks), None
    for step in steps:
        began = time.perf_counter()
        if step.first and step.cycle > 0:
            trajectory.restart(step.cycle)
        if step.first or loss_fn is None:                               # None: resumed inside a cycle
            loss_fn = loss_for_cycle(trajectory.run, t, step.cycle, ranks.device)
        trajectory.model.looping = step.looping
        seed_dropout(trajectory.seed, trajectory.step, ranks.group_rank)
        batch = trajectory.batches.take(step.sequences)[ranks.group_rank::ranks.group_size]
        size = micro_batch_size(config, step.sequences, ranks.group_size)
        micro_batches = batch.to(ranks.device).split(size)              # this rank's share
        loss, norm = train_step(model, trajectory.optimizer, micro_batches, loss_fn, step.rates)
        loss, norm, stopping = ranks.mean(loss, norm, stop.is_set())
        stop_requested = stopping > 0                                   # any rank was asked to
        trajectory.check_finite(step.cycle, f"loss {loss}, gradient norm {norm}", loss + norm)
        trajectory.step += 1
        if step.averaging:
            trajectory.update_average()
        speed = step.sequences * config.sequence_len * ranks.groups / (time.perf_counter() - began)
        if ranks.is_main:
            trajectory.run.log(kind="step", trajectory=t, cycle=step.cycle, step=trajectory.step, loss=loss,
                               grad_norm=norm, tokens_per_s=round(speed))
        bar.set_postfix_str(f"trajectory {t} cycle {step.cycle} loss {loss:.3f} {speed:,.0f} tokens/s", False)
        bar.update()
        if step.last:
            trajectory.use_average()
            trajectory.save_member(step.cycle, fitness_set)
        if step.last or stop_requested or config.resume_every and trajectory.step % config.resume_every == 0:
            trajectory.save_checkpoint()
        if stop_requested:
            return True
    return False


def run_cycles(config, cycles, loss_for_cycle, resume_command, first_weights=None, **about):
    """
    Train these cycles, a range, of every trajectory that has not had them. loss_for_cycle(run, t, cycle,
    device): the loss function of a cycle, (model, tokens (B, T + 1)) -> nats per token. first_weights: a
    state dict to begin with; about: more for config.json. Exits with code 75 where it was asked to stop.
    """
    data = loader.load(config)
    run, steps = RunDirectory(config, data.fingerprint), schedule(config, data.sequences_per_epoch)
    begin, end = (sum(step.cycle < cycle for step in steps) for cycle in (cycles.start, cycles.stop))
    if begin and not run.folder(0).exists():
        fail(f"run_dir='{run.path}' has no members: run train.py on this config first")
    ranks = join(config)
    with run.open(ranks, **about), stop_request() as stop, progress_bar(
            total=end * len(ranks.trajectories), unit="step", disable=ranks.rank > 0) as bar:
        epochs = config.trajectories * config.epochs_until(config.cycles)
        print0(f"cycles {cycles.start} .. {cycles.stop - 1} of {config.cycles}; trajectories: "
               f"{config.trajectories}, at a time: {ranks.groups}, ranks for each: {ranks.group_size}, on "
               f"{ranks.device.type}; {epochs:g} epochs in all")
        for t in ranks.trajectories:            # one after another; other groups of ranks take the others
            tensors, at = run.load_checkpoint(t)
            if ranks.mean(at["step"]) != [at["step"]]:
                fail(f"ranks found different checkpoints of trajectory {t}: share one disk, start again")
            if at["step"] < begin:
                fail(f"trajectory {t} has not had its first {cycles.start} cycles: run train.py")
            done = min(at["step"], end)             # before this launch: not in the bar's speed
            bar.n = bar.last_print_n = bar.n + done
            bar.initial = getattr(bar, "initial", 0) + done
            if at["step"] >= end:
                continue
            gc.collect()                        # the last one's memory: a compiled block refers to itself
            trajectory = Trajectory(run, t, data, ranks, first_weights)
            if tensors:
                trajectory.resume(tensors, at["environment"], steps[:at["step"]])
                tensors = None                  # its file is mapped, and takes room even once it is replaced
            check_room(config, run.path, sum(p.numel() for p in trajectory.model.parameters()))
            if train(trajectory, steps[trajectory.step:end], loss_for_cycle, data.fit, stop, bar):
                print0(f"stopped after step {trajectory.step} of trajectory {t}, saved; resume with: "
                       f"{resume_command}", ranks.is_main)
                raise SystemExit(STOPPED)
            trajectory = None
        try:
            ranks.barrier(everyone=True)
        except RuntimeError:                    # a group that was asked to stop has left: no barrier
            if stop.is_set():
                raise SystemExit(STOPPED) from None
            raise
    ranks.leave()


@script
def main(argv=None):
    config, _ = from_args(argv, __doc__)
    last = min(config.distill_from, config.cycles)
    run_cycles(config, range(last), lambda run, t, cycle, device: label_loss, next_command("train.py", argv))
    print0(f"next: {next_command('distill.py' if last < config.cycles else 'prior.py', argv)}")


if __name__ == "__main__":
    main()
