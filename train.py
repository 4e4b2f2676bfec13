"""
Primitive 1, the cyclic schedule (paper, section 3.1): few trajectories, many cycles, one member at the end of each.
Within a cycle the learning rate falls while the weight decay rises; between cycles the weights get noise.

One process:  python train.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 train.py configs/1p8b.py

Trains the cycles before distill_from (all, where there is no chain) on labels alone, into run_dir: config.json,
metrics.jsonl, and per trajectory its members cycle_CCC.pt and resume.pt. Run again, it does only what is missing.
"""
import contextlib
import math
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import from_args, refuse
from data import loader
from model import GPT
from optim import MuonAdamW
from population import Run, join_world, next_command

LR_FLOOR, WD_FLOOR = 0.08, 0.7              # f and g of the paper: the multipliers' lowest values
NOISE_FIRST, NOISE_LAST = 0.25, 0.05        # of a weight's standard deviation, after the first cycle and before the last


# ------------------------------------------------------------------------------------------- schedules

def rate_multipliers(schedule, step, length):
    """(learning rate, weight decay) multipliers at `step` of a cycle of `length` steps (paper, eq. 4)."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / length)), 1.0
    lr = LR_FLOOR + (1 - LR_FLOOR) * (1 - step / length)
    return lr, WD_FLOOR + (1 - WD_FLOOR) * (1 - lr) / (1 - LR_FLOOR)


def noise_scale(cycle, cycles):
    """Of the noise before `cycle` = 1 .. cycles - 1: half a cosine from first to last (paper, eq. 5)."""
    progress = (cycle - 1) / max(1, cycles - 2)
    return NOISE_LAST + (NOISE_FIRST - NOISE_LAST) * 0.5 * (1 + math.cos(math.pi * progress))


def batch_tokens(config, cycle):
    """Tokens per step, constant within a cycle: one value in the middle half of the cycles, another at both ends."""
    last = config.cycles - 1
    middle = last == 0 or 1 - abs(2 * cycle / last - 1) >= 0.5
    return config.batch_tokens if middle else config.batch_tokens_ends


def cycle_length(config, cycle, sequences_per_epoch):
    """Steps of a cycle."""
    tokens = config.epochs_per_cycle * sequences_per_epoch * config.sequence_len
    return max(1, round(tokens / batch_tokens(config, cycle)))


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
    _, _, loss = model(batch[:, :-1], batch[:, 1:])
    return loss


def apply_gradients(model, optimizer, lr_multiplier, wd_multiplier):
    """Clip to norm 1 and step; the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.set_rates(lr_multiplier, wd_multiplier)
    optimizer.step()
    return norm


def train_step(model, optimizer, micro_batches, loss_fn, multipliers):
    """One optimizer step over this rank's micro-batches, a tuple of (B, T + 1): (mean loss, gradient norm)."""
    optimizer.zero_grad()
    total = 0
    for i, batch in enumerate(micro_batches, 1):
        # ranks exchange gradients once, with the last micro-batch
        wait = model.no_sync() if hasattr(model, "no_sync") and i < len(micro_batches) else contextlib.nullcontext()
        with wait:
            loss = loss_fn(model, batch) / len(micro_batches)
            loss.backward()
        total = total + loss.detach()
    return total, apply_gradients(model, optimizer, *multipliers)


# ------------------------------------------------------------------------------------------ trajectories

def seed_step(seed, step, rank):
    """Dropout depends on seed, step and rank alone, so that a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def start(config, t, world, run):
    """(model, optimizer, position in the data, first cycle to do, step) of trajectory t, new or from its resume state."""
    torch.manual_seed(config.seed + t)
    model = GPT(config).init_weights().place(world.device, config.compile)
    optimizer = MuonAdamW(model.named_parameters(), config.lr_scale)
    state = run.read_resume(t)
    if state is None:
        return model, optimizer, 0, 0, 0
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, state["position"], state["cycles_done"], state["step"]


def run_cycles(config, first, last, loss_for_cycle, then):
    """
    Train cycles first .. last - 1 of every trajectory that does not have them yet. loss_for_cycle(run, model, t, cycle)
    gives the loss function (model, batch) -> nats per token of one cycle; it is called when the cycle starts. `then`
    says what to run next.
    """
    data = loader.load(config)
    world = join_world(config)
    run = Run(config, data.fingerprint)
    world.barrier(everyone=True)            # config.json is there
    batches = lambda t: loader.Batches(data.train, data.doc_starts, config.sequence_len, config.epoch_multiple, config.seed + t)
    lengths = [cycle_length(config, c, batches(0).per_epoch) for c in range(config.cycles)]
    if world.rank == 0:
        print(f"cycles {first} .. {last - 1} of {config.cycles}, trajectories: {config.trajectories}, ranks: {world.size} in {world.groups} groups, on {world.device.type}")
    bar = tqdm(total=sum(lengths) * len(world.trajectories), unit="step", disable=world.rank > 0, dynamic_ncols=True)
    for t in world.trajectories:            # one after another; other groups of ranks take the others
        model, optimizer, position, done, step = start(config, t, world, run)
        if done < first:
            refuse(f"trajectory {t} has {done} of the {first} cycles before distill_from={config.distill_from}: run train.py on this config first")
        bar.update(step)
        wrapped = model
        if world.data_size > 1:
            wrapped = DistributedDataParallel(model, process_group=world.data_group, gradient_as_bucket_view=True)
        stream = batches(t)
        stream.seek(position)
        for cycle in range(done, last):
            if cycle > 0:
                perturb(model, noise_scale(cycle, config.cycles), seed=(config.seed + t) * 100_003 + cycle * 31_337)
            loss_fn = loss_for_cycle(run, model, t, cycle)
            model.train()
            for s in range(lengths[cycle]):
                began = time.perf_counter()
                seed_step(config.seed + t, step, world.data_rank)
                rows = stream.take(batch_tokens(config, cycle) // config.sequence_len)          # of all ranks
                mine = rows[world.data_rank::world.data_size].to(world.device)
                multipliers = rate_multipliers(config.schedule, s, lengths[cycle])
                loss, norm = train_step(wrapped, optimizer, mine.split(config.micro_batch), loss_fn, multipliers)
                if world.data_size > 1:
                    dist.all_reduce(loss, group=world.data_group)
                loss = loss.item() / world.data_size
                step += 1
                if not math.isfinite(loss):
                    raise SystemExit(f"trajectory {t}, cycle {cycle}, step {s}: the loss is {loss}; nothing of this cycle is kept")
                speed = batch_tokens(config, cycle) / (time.perf_counter() - began)
                bar.update()
                bar.set_postfix_str(f"trajectory {t} cycle {cycle} loss {loss:.3f}, {speed * world.groups:,.0f} tokens/s", refresh=False)
                if world.lead:
                    run.log(kind="step", trajectory=t, cycle=cycle, step=step, loss=loss, grad_norm=norm.item(), tokens_per_s=round(speed))
            if world.lead:
                fit_loss = -float(loader.score(model, data.fit, config.micro_batch).mean())
                run.log(kind="cycle", trajectory=t, cycle=cycle, step=step, fit_loss=fit_loss)
                run.save_member(t, cycle, model.state_dict(), epochs=(cycle + 1) * config.epochs_per_cycle, fit_loss=fit_loss)
                run.save_resume(t, dict(weights=model.state_dict(), optimizer=optimizer.state_dict(), position=stream.position, cycles_done=cycle + 1, step=step))
            world.barrier()
    bar.close()
    world.barrier(everyone=True)
    world.close()
    if world.rank == 0:
        print(then)


def main(argv=None):
    config = from_args(argv, __doc__)
    last = min(config.distill_from, config.cycles)
    then = next_command("distill.py" if last < config.cycles else "prior.py", argv)
    run_cycles(config, 0, last, lambda run, model, t, cycle: label_loss, then)


if __name__ == "__main__":
    main()
