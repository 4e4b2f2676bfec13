"""
Primitive 1, the cyclic schedule (paper, section 3.1): few trajectories, many cycles, one member at the end of each.
Within a cycle the learning rate falls while the weight decay rises; between cycles the weights get noise.

One process:  python train.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 train.py configs/1p8b.py

Trains the cycles before distill_from (all, where there is no chain) on labels alone, into run_dir: config.json,
metrics.jsonl, per trajectory its members cycle_CCC.pt and resume_STEP.pt, the state to go on from. Run again, it does only
what is missing; stopped by Ctrl-C or SIGTERM it finishes its step and saves that state first.
"""
import contextlib
import gc
import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from config import from_args
from data import loader
from errors import refuse
from model import GPT
from optim import MuonAdamW
from population import Run, setup
from world import (STOPPED, StopSignals, World, batch_sequences, join_world, micro_batch_of, next_command, one_line_errors,
                   say_next)

LR_FLOOR, WD_FLOOR = 0.08, 0.7              # f and g of the paper: the multipliers' lowest values
NOISE_FIRST, NOISE_LAST = 0.25, 0.05        # of a weight's standard deviation, after the first cycle and before the last
EMA_FROM = 0.9                              # the part of a cycle after which weights are averaged, where they are
WARMDOWN = 5                                # schedule=warmdown: constant, then down to 0 over the last 1/5


# ------------------------------------------------------------------------------------------- schedules

def rate_multipliers(schedule, step, length):
    """
    (learning rate, weight decay) multipliers at `step` of a decay of `length` steps: cycle (paper, eq. 4), the baseline's
    cosine, record 11's warmdown.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / length)), 1.0
    if schedule == "warmdown":
        return min(1.0, WARMDOWN * (1 - step / length)), 1.0
    lr = LR_FLOOR + (1 - LR_FLOOR) * (1 - step / length)
    return lr, WD_FLOOR + (1 - WD_FLOOR) * (1 - lr) / (1 - LR_FLOOR)


def noise_scale(cycle, cycles):
    """Noise before `cycle` = 1 .. cycles - 1, in standard deviations of a weight: half a cosine down (paper, eq. 5)."""
    progress = (cycle - 1) / max(1, cycles - 2)
    return NOISE_LAST + (NOISE_FIRST - NOISE_LAST) * 0.5 * (1 + math.cos(math.pi * progress))


def tokens_per_step(config, cycle):
    """Constant within a cycle: one value in the middle half of the cycles, another in the quarters at both ends."""
    last = config.cycles - 1
    middle = last == 0 or last <= 4 * cycle <= 3 * last
    return config.batch_tokens if middle else config.batch_tokens_ends


def cycle_lengths(config, sequences_per_epoch):
    """Steps of every cycle. Exits with code 2 where the end of one is too short for an average of its weights."""
    epoch = sequences_per_epoch * config.sequence_len
    lengths = [max(1, round(config.cycle_epochs(c) * epoch / tokens_per_step(config, c))) for c in range(config.cycles)]
    shortest = min(lengths)
    if config.ema_decay and shortest - 1 - config.ema_every < EMA_FROM * shortest:
        refuse(f"ema_every={config.ema_every}: the end of a cycle of {shortest} steps "
               "holds no two updates of the average; lower it", common=True)
    return lengths


def place_in_decay(config, lengths, cycle, step):
    """(step, length) of the decay that `step` of `cycle` is in: its cycle's own, or one over all cycles (restart=none)."""
    if config.restart == "none":
        return sum(lengths[:cycle]) + step, sum(lengths)
    return step, lengths[cycle]


def noise_seed(seed, cycle):
    """The public script's formula; restart=fresh draws its new weights from it, too."""
    return seed * 100_003 + cycle * 31_337


@torch.no_grad()
def perturb(model, scale, seed):
    """Gaussian noise of `scale` standard deviations on every parameter, drawn on the CPU: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.numel() > 1:
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.add_(noise * (scale * p.float().std()))


# --------------------------------------------------------------------------------------------- one step

def label_loss(model, batch):
    """Cross-entropy plus the weighted multi-token-prediction loss of sequences (B, T + 1), in nats per token."""
    loss, mtp = model(batch[:, :-1], batch[:, 1:])
    return loss + mtp


def average_weights(average, model, decay):
    """An EMA of the weights, name -> float32 tensor, updated in place and returned; the first (average None) is their copy."""
    weights = {name: w.detach().float() for name, w in model.state_dict().items()}
    if average is None:
        return {name: w.clone() for name, w in weights.items()}
    return {name: average[name].lerp_(w, 1 - decay) for name, w in weights.items()}


def train_step(model, optimizer, micro_batches, loss_fn, multipliers):
    """
    One optimizer step over this rank's micro-batches, each (B, T + 1), gradients clipped to norm 1; loss_fn(model, tokens) in
    nats per token; multipliers of learning rate and weight decay. Returns (mean loss, gradient norm before).
    """
    model.zero_grad(set_to_none=False)          # in place: gradients stay what DDP reduces
    total = 0
    for i, batch in enumerate(micro_batches, 1):
        # ranks exchange gradients once, with the last micro-batch
        sync = model.no_sync() if hasattr(model, "no_sync") and i < len(micro_batches) else contextlib.nullcontext()
        with sync:
            loss = loss_fn(model, batch) / len(micro_batches)
            loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)      # where it is not finite the loop ends (refuse_nan)
    optimizer.step(*multipliers)
    return total, norm


# ------------------------------------------------------------------------------------------- the loop
# from its inside out: run_cycles goes over trajectories, train_trajectory over cycles, train_cycle over steps

class Trajectory:
    """
    One model in training. tensors() and about() are all that a resumed run needs to go on bit for bit, from any step;
    `state` is a State of theirs, or None.
    """

    def __init__(self, config, t, data, world, state):
        self.t, self.seed = t, config.seed + t
        torch.manual_seed(self.seed)
        self.model = GPT(config).init_weights().place(world.device, config.compile)
        self.new_optimizer = lambda: MuonAdamW(
            self.model.named_parameters(), config.lr_scale, world.data_group, config.momentum_warmup)
        self.optimizer = self.new_optimizer()
        self.batches = loader.Batches(data.train, data.doc_starts, config.sequence_len, config.epoch_multiple, self.seed)
        self.cycles_done, self.cycle_step, self.step, self.average = 0, 0, 0, None      # average: EMA of the weights, or None
        if state:
            self.go_on_from(*state)
        self.ddp_model = distributed(self.model, world)

    def go_on_from(self, tensors, about):
        part = lambda prefix: {name[len(prefix):]: w for name, w in tensors.items() if name.startswith(prefix)}
        try:
            self.model.load_state_dict(part("model."))
            moments = {name: (tensors[f"m.{name}"], tensors[f"v.{name}"]) for name in part("m.")}
            self.optimizer.load_state_dict(dict(steps=about["updates"], moments=moments))
        except (KeyError, RuntimeError, AssertionError):
            refuse(f"the resume state of trajectory {self.t} is of another model: "
                   "restore it, or delete the trajectory's folder and train it again")
        self.average = {name: w.to(self.model.device, copy=True) for name, w in part("average.").items()} or None
        self.batches.position = about["position"]
        self.cycles_done, self.cycle_step, self.step = about["cycles_done"], about["cycle_step"], about["step"]

    def restart(self):
        """Between two cycles. noise: on the weights, moments stay; fresh: new weights and moments; none: nothing."""
        config, cycle = self.model.config, self.cycles_done
        if config.restart == "noise":
            perturb(self.model, noise_scale(cycle, config.cycles), noise_seed(self.seed, cycle))
        if config.restart == "fresh":
            torch.manual_seed(noise_seed(self.seed, cycle))
            self.model.init_weights()
            self.optimizer = self.new_optimizer()

    def tensors(self, moments):
        """name -> tensor on the CPU, of the weights, their average and these moments (name -> (m, v))."""
        tensors = {f"model.{name}": w for name, w in self.model.state_dict().items()}
        tensors |= {f"average.{name}": w for name, w in (self.average or {}).items()}
        tensors |= {f"{kind}.{name}": w for name, pair in moments.items() for kind, w in zip("mv", pair)}
        return {name: w.detach().cpu().contiguous() for name, w in tensors.items()}

    def about(self):
        return dict(position=self.batches.position, cycles_done=self.cycles_done, cycle_step=self.cycle_step,
                    step=self.step, updates=self.optimizer.steps)


def distributed(model, world):
    """The model whose backward pass averages the gradients over the ranks of a group; itself for one rank."""
    if world.data_size == 1:
        return model
    with warnings.catch_warnings():             # torch 2.13 renames broadcast_buffers, which 2.11 only knows by this name
        warnings.simplefilter("ignore", FutureWarning)
        shared = DistributedDataParallel(
            model, process_group=world.data_group, gradient_as_bucket_view=True, broadcast_buffers=False)
    # after a first pass DDP lays out its buckets anew, and sums in another order:
    # now, so that a resumed run sums as it would have
    size = micro_batch_of(model.config, max(batch_sequences(model.config)), world.data_size)
    label_loss(shared, torch.zeros(size, model.config.sequence_len + 1, dtype=torch.int64, device=model.device)).backward()
    return shared


def seed_step(seed, step, rank):
    """Dropout depends on seed, step and rank alone: a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


@dataclass
class Launch:
    """One start of a script: what its trajectories share."""
    run: Run
    data: loader.Data
    lengths: list               # steps of every cycle
    world: World
    stop: StopSignals
    bar: object = None          # progress


def save_state(launch, trajectory):
    run, world = launch.run, launch.world
    moments = trajectory.optimizer.state_dict()["moments"]      # all ranks of the group together; the first has them all
    if world.lead:
        run.save_resume(trajectory.t, trajectory.tensors(moments), setup=setup(run.config, world), **trajectory.about())
    world.barrier()                                 # on disk for all of them


def keep_member(launch, trajectory):
    """At a cycle's end: the member, its loss on the fitness set (to watch a long run by), and the state to go on from."""
    run, model, t, cycle = launch.run, trajectory.model, trajectory.t, trajectory.cycles_done - 1
    if launch.world.lead:
        fit_loss = -float(loader.score(model, launch.data.fit, run.config.micro_batch).mean())
        if not math.isfinite(fit_loss):
            refuse(f"trajectory {t}, cycle {cycle}: the loss on the fitness set is {fit_loss}; this member is not kept, "
                   "start anew in another --run_dir, with a lower --lr_scale or another --seed", code=1)
        run.log(kind="cycle", trajectory=t, cycle=cycle, step=trajectory.step, fit_loss=fit_loss)
        run.save_member(t, cycle, model.state_dict(), epochs=run.config.epochs_until(cycle + 1), fit_loss=fit_loss)
    save_state(launch, trajectory)


def refuse_nan(trajectory, rows, loss, norm):
    """Where a loss or a gradient norm is no finite number: one line that says on which step and sequences, exit code 1."""
    if not math.isfinite(loss + norm):
        newest = trajectory.batches.position - 1
        refuse(f"trajectory {trajectory.t}, cycle {trajectory.cycles_done}, step {trajectory.cycle_step}: "
               f"loss {loss}, gradient norm {norm} on sequences {newest - len(rows) + 1} .. {newest} of its order; "
               "what was saved before stays: start anew in another --run_dir, with a lower --lr_scale or another --seed",
               code=1)


def report(launch, trajectory, loss, norm, tokens_per_s):
    launch.bar.set_postfix_str(f"trajectory {trajectory.t} cycle {trajectory.cycles_done} loss {loss:.3f}, "
                               f"{tokens_per_s:,.0f} tokens/s", refresh=False)
    launch.bar.update()
    if launch.world.lead:
        launch.run.log(kind="step", trajectory=trajectory.t, cycle=trajectory.cycles_done, step=trajectory.step,
                       loss=loss, grad_norm=norm, tokens_per_s=round(tokens_per_s))


def train_cycle(launch, trajectory, loss_fn):
    """The steps of a cycle that are left, or until a rank of the group is asked to stop."""
    config, world, stop, model = launch.run.config, launch.world, launch.stop, trajectory.model
    cycle, length = trajectory.cycles_done, launch.lengths[trajectory.cycles_done]
    sequences = tokens_per_step(config, cycle) // config.sequence_len
    micro_batch = micro_batch_of(config, sequences, world.data_size)
    for s in range(trajectory.cycle_step, length):
        began = time.perf_counter()
        at, span = place_in_decay(config, launch.lengths, cycle, s)
        model.looping = at >= config.loop_from * span
        seed_step(trajectory.seed, trajectory.step, world.data_rank)
        rows = trajectory.batches.take(sequences)               # of all ranks: (n, T + 1)
        micro_batches = world.to_device(rows[world.data_rank::world.data_size]).split(micro_batch)
        rates = rate_multipliers(config.schedule, at, span)
        loss, norm = train_step(trajectory.ddp_model, trajectory.optimizer, micro_batches, loss_fn, rates)
        loss, norm, asked = world.mean(loss, norm, stop.asked)
        stop.agreed = asked > 0                     # any rank
        refuse_nan(trajectory, rows, loss, norm)
        if config.ema_decay and s >= EMA_FROM * length and (length - 1 - s) % config.ema_every == 0:      # the last step, too
            trajectory.average = average_weights(trajectory.average, model, config.ema_decay)
        trajectory.step, trajectory.cycle_step = trajectory.step + 1, s + 1
        report(launch, trajectory, loss, norm, sequences * config.sequence_len / (time.perf_counter() - began) * world.groups)
        if stop.agreed:
            return
        if config.resume_every and trajectory.step % config.resume_every == 0 and s + 1 < length:
            save_state(launch, trajectory)


def train_trajectory(launch, trajectory, end, loss_for_cycle):
    """Its cycles that are left before `end`, a member after each; or until asked to stop."""
    config, model = launch.run.config, trajectory.model
    if launch.world.lead:
        launch.run.check_room(sum(p.numel() for p in model.parameters()))
    for cycle in range(trajectory.cycles_done, end):
        if trajectory.cycle_step == 0 and cycle > 0:
            trajectory.restart()
        train_cycle(launch, trajectory, loss_for_cycle(launch.run, trajectory.t, cycle, model.device))
        if launch.stop.agreed:
            save_state(launch, trajectory)
            return
        if trajectory.average:                      # the next cycle, too, starts from it
            model.load_state_dict({name: w.float().lerp(trajectory.average[name], config.ema_share)
                                   for name, w in model.state_dict().items()})
        trajectory.cycles_done, trajectory.cycle_step, trajectory.average = cycle + 1, 0, None
        model.looping = True                        # as whoever uses the member runs it
        keep_member(launch, trajectory)


def run_cycles(config, first, end, loss_for_cycle, resume_command, first_weights=None, **about):
    """
    Train cycles first .. end - 1 of every trajectory that has not had them. loss_for_cycle(run, t, cycle, device) gives the
    loss function of a cycle, (model, tokens (B, T + 1)) -> nats per token. first_weights: a state dict to begin with; about:
    what config.json keeps beside the config. Asked to stop, it saves after the step at hand, prints resume_command and exits
    with code 75.
    """
    data = loader.load(config)
    run = Run(config, data.fingerprint)
    lengths = cycle_lengths(config, data.sequences_per_epoch)
    world = join_world(config)
    with run, StopSignals() as stop:
        states = run.begin(world, first, end, **about)        # trajectory -> State or None
        micro_batches = {micro_batch_of(config, n, world.data_size) for n in batch_sequences(config)}
        if world.rank == 0:
            print(f"cycles {first} .. {end - 1} of {config.cycles}; "
                  f"trajectories: {config.trajectories}, at a time: {world.groups}, ranks for each: {world.data_size}, "
                  f"on {world.device.type}; "
                  f"micro-batches of {' and '.join(map(str, sorted(micro_batches)))}; "
                  f"{config.trajectories * config.epochs_until(config.cycles):g} epochs in all"
                  + f"; alpha {config.distill_alpha:g}, T {config.distill_temperature:g}" * (first >= config.distill_from),
                  flush=True)
        launch = Launch(run, data, lengths, world, stop)
        # counts all cycles, so that the ETA is that of the population: train.py alone ends early
        launch.bar = world.progress(total=sum(lengths) * len(states),
                                    initial=sum(s.about["step"] for s in states.values() if s), unit="step")
        for t in states:                            # one after another; other groups of ranks take other trajectories
            if states[t] and states[t].about["cycles_done"] >= end:
                continue
            trajectory = None                       # frees the last one's memory:
            gc.collect()                            # a compiled block refers to itself
            trajectory, states[t] = Trajectory(config, t, data, world, states[t]), None         # lets go of the file
            if first_weights and trajectory.step == 0:
                trajectory.model.load_state_dict(first_weights)
            train_trajectory(launch, trajectory, end, loss_for_cycle)
            if stop.agreed:
                launch.bar.close()
                if world.lead:
                    print(f"stopped after step {trajectory.step} of trajectory {t}, saved; "
                          f"to go on: {resume_command}", flush=True)
                raise SystemExit(STOPPED)
        launch.bar.close()
        world.barrier(everyone=True)
    world.close()


def main(argv=None):
    config, _ = from_args(argv, __doc__)
    last = min(config.distill_from, config.cycles)
    with one_line_errors(config):
        run_cycles(config, 0, last, lambda run, t, cycle, device: label_loss, next_command("train.py", argv))
    say_next("distill.py" if last < config.cycles else "prior.py", argv)


if __name__ == "__main__":
    main()
