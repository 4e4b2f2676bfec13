"""
What a run will be, cost and need, before it is begun: python -m tools.plan CONFIG [--name=value ...]
Counted from the recipe, with the model on the meta device (nothing is allocated); memory is estimated.

Of its own: --ranks=8 (0: the most up to 8 that can share the batches)  --price=3 (dollars per GPU and hour)
            --mfu=0.28 (model FLOPs utilisation; the record's own)  --peak_tflops=989 (an H100's, in bf16)
            --gpu_gb=80
"""
import dataclasses
import itertools
import math
import textwrap

import torch

from data import loader
from infra.config import from_args, student_of
from infra.console import fail, script
from infra.distributed import batch_sizes, can_share, micro_batch_size, processes
from model import CHUNK_BYTES, GPT
from optim import MuonAdamW
from train import noise_scale, schedule

OPTIONS = dict(ranks=0, mfu=0.28, peak_tflops=989.0, price=3.0, gpu_gb=80.0)
GIB = 2 ** 30
# bytes saved for backward per token, layer application and unit of n_embd: estimated, and measured
# (results/performance.md)
EAGER, COMPILED = 58.4, 43.0
HEAD, HEAD_KL = 3, 5            # float32 logits of a chunk that live at once: for the labels, for a teacher


# ------------------------------------------------------------------------------------------- the model

def meta_model(config):
    """The model in its training types on CUDA, without memory."""
    with torch.device("meta"):
        model = GPT(config)
    model.transformer.wte.bfloat16()
    return model


def part_of(name):
    """The part of the model that a parameter belongs to."""
    for word, part in {"mtp_": "multi-token prediction", "wte": "embedding", "lm_head": "head",
                       "ve_projs": "value embeddings", "_mix": "head mixes (IHA)", ".mlp.": "MLPs",
                       ".attn.": "attention"}.items():
        if word in name:
            return part
    return "lambdas and skips"


def parameters_by_part(model):
    parts = {}
    for name, p in model.named_parameters():
        parts[part_of(name)] = parts.get(part_of(name), 0) + p.numel()
    return parts


def mean_keys(T, window):
    """Keys that a token attends to, on average over a sequence of T, itself and `window` before it."""
    return sum(min(t, window) + 1 for t in range(T)) / T


def forward_flops(model, looping, mtp):
    """
    Model FLOPs of a forward pass per token, by term: 2 per weight of every matrix and application (tables,
    head mixes and norms are free), 4 n_embd per key attended to. Counted by the recipe, whatever an
    implementation saves.
    """
    def linear(module):
        return 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))

    c, T, head = model.config, model.config.sequence_len, linear(model.lm_head)
    attention = {"L": 4 * c.n_embd * mean_keys(T, T), "S": 4 * c.n_embd * mean_keys(T, T // 2)}
    terms = {"layers": 0, "value embeddings": 0, "attention": 0, "head": head, "multi-token prediction": 0}
    for i in model.layers if looping else range(c.n_layer):
        window = "L" if i == c.n_layer - 1 else c.window_pattern[i % len(c.window_pattern)]
        terms["layers"] += linear(model.transformer.h[i])
        terms["value embeddings"] += linear(model.ve_projs[str(i)]) if str(i) in model.ve_projs else 0
        terms["attention"] += attention[window]
    if mtp and c.mtp_weight:
        terms["multi-token prediction"] = (
            linear(model.mtp_proj) + linear(model.mtp_block) + head + attention["L"])
    return terms


def step_flops(model, looping, teachers):
    """Model FLOPs of training per token: three forwards, and one without the MTP head for each teacher."""
    total = 3 * sum(forward_flops(model, looping, mtp=True).values())
    return total + teachers * sum(forward_flops(model, looping=True, mtp=False).values())


# ------------------------------------------------------------------------------------------- the run

def sequences_per_epoch(config):
    """As the data has it where it is prepared, else from the token counts alone."""
    if loader.file_path(config, "_train.pt").exists():
        return loader.load(config).sequences_per_epoch
    return loader.sequences_per_epoch(config, config.train_tokens - config.fitness_tokens)


def held_out_tokens(config):
    """Targets on which every member is scored, of both sets."""
    return sum(tokens // (config.sequence_len + 1) * config.sequence_len
               for tokens in (config.fitness_tokens, config.val_tokens))


def cycles_of(config, sequences):
    """[(first, last, steps, tokens of a step)] of runs of like cycles."""
    rows = []
    for cycle, steps in itertools.groupby(schedule(config, sequences), key=lambda step: step.cycle):
        steps = list(steps)
        like = len(steps), steps[0].sequences * config.sequence_len
        if rows and rows[-1][2:] == like:
            rows[-1] = (rows[-1][0], cycle, *like)
        else:
            rows.append((cycle, cycle, *like))
    return rows


def flops_of(config, model, sequences, teachers=1):
    """{script: model FLOPs in all}; teachers: of a distilled cycle."""
    per_token = {(looping, chain): step_flops(model, looping, teachers * chain)
                 for looping in (False, True) for chain in (False, True)}
    flops = {"train.py": 0, "distill.py": 0}
    for step in schedule(config, sequences):
        chain = step.cycle >= config.distill_from
        tokens = config.trajectories * step.sequences * config.sequence_len
        flops["distill.py" if chain else "train.py"] += tokens * per_token[step.looping, chain]
    tokens = config.trajectories * config.cycles * held_out_tokens(config)
    flops["prior.py"] = tokens * sum(forward_flops(model, looping=True, mtp=False).values())
    return flops


def memory_of(config, model, ranks):
    """
    ({part: bytes per rank}, {part: bytes per sequence of a micro-batch}) with so many ranks per trajectory,
    of the costliest script.
    """
    def size(tensors):
        return sum(t.nbytes for t in tensors)

    C, T, mtp, chain = (config.n_embd, config.sequence_len, bool(config.mtp_weight),
                        config.distill_from < config.cycles)
    parameters = list(model.parameters())
    weights = sum(p.numel() for p in parameters)
    optimizer = MuonAdamW(model.named_parameters(), config.lr_scale)
    groups = {kind: [g for g in optimizer.groups if g["kind"] == kind] for kind in ("adamw", "muon")}
    chunk = min(CHUNK_BYTES["cuda"], 4 * config.micro_batch * T * config.vocab_size)
    activations = T * C * (COMPILED if config.compile else EAGER) * (len(model.layers) + mtp)
    fixed = {
        "parameters (fp32; embedding bf16)": size(parameters),
        "gradients": size(parameters),
        "AdamW": size(t for g in groups["adamw"] for t in [*g["m"], *g["v"]]),
        "Muon, this rank's share": size(t for g in groups["muon"] for t in (g["m"], g["v"])) / ranks,
        "bf16 copies of the weights": 2 * weights,
        "mixed heads' weights": 2 * 3 * C * C * (config.n_layer + mtp) * config.iha,
        "teacher (bf16)": 2 * weights * chain,
        "average of the weights (fp32)": 4 * weights * bool(config.ema_decay),
        "head: its gradients, a chunk": (
            (1 + mtp) * size([model.lm_head.weight]) + (HEAD + HEAD_KL * chain) * chunk),
    }
    return fixed, {"activations": activations}


# ------------------------------------------------------------------------------------------ the print

def print_model(model):
    parts = parameters_by_part(model)
    print(f"parameters: {sum(parts.values()):,}")
    for part, count in parts.items():
        print(f"  {part:24} {count:>15,}")
    print(f"model GFLOP per trained token: {step_flops(model, True, 0) / 1e9:.4f}, "
          f"with the teacher's forward pass {step_flops(model, True, 1) / 1e9:.4f}")
    for term, flops in forward_flops(model, True, mtp=True).items():
        print(f"  {term:24} {3 * flops / 1e9:>15.4f}")


def print_cycles(config, sequences):
    trajectories, cycles = config.trajectories, config.cycles
    print(f"population: {trajectories} x {cycles} = {trajectories * cycles} members, "
          f"{config.epochs_until(cycles) * trajectories:g} epochs of {sequences:,} sequences in all")
    for first, last, steps, tokens in cycles_of(config, sequences):
        print(f"  cycles {first:>3} .. {last:>3}: {steps:>6} steps of {tokens:,} tokens")
    steps, what = schedule(config, sequences), "the one decay" if config.restart == "none" else "a cycle"
    (lr, decay), (last_lr, last_decay) = steps[0].rates, steps[-1].rates
    print(f"  rates, first and last step of {what}: learning rate x {lr:.4f} .. {last_lr:.4f}, "
          f"weight decay x {decay:.4f} .. {last_decay:.4f}")
    if cycles > 1 and config.restart == "noise":
        scales = " ".join(f"{noise_scale(c, cycles):.4f}" for c in range(1, cycles))
        print(textwrap.fill(f"noise before cycles 1, 2, ...: {scales}", 110, initial_indent="  ",
                            subsequent_indent=" " * 33))
    chain = config.distill_from < cycles
    print(f"  teacher: {f'from cycle {config.distill_from} on' if chain else 'none'}")


def print_cost(config, model, sequences, options):
    flops = flops_of(config, model, sequences)
    student = flops_of(student_of(config), model, sequences, config.student_teachers)["distill.py"]
    print(f"cost on {options.ranks} GPUs of {options.peak_tflops:g} TFLOPS at {options.mfu:.0%} of that, "
          f"${options.price:g} per GPU and hour:")
    for what, count in {**flops, "in all": sum(flops.values()), f"--student of {config.student_teachers}, "
                        f"{config.student_epochs:g} epochs": student}.items():
        hours = count / (options.ranks * options.peak_tflops * 1e12 * options.mfu) / 3600
        dollars = hours * options.ranks * options.price
        print(f"  {what:30} {count:>10.3e} FLOP {hours:>10.3g} h {dollars:>10,.2f} dollars")


def print_machine(config, model, options):
    groups = math.gcd(options.ranks, config.trajectories)
    share = options.ranks // groups
    print(f"ranks: {options.ranks} in {groups} groups of {share}; "
          f"each group trains {config.trajectories // groups} of the trajectories, one after another")
    fixed, per_sequence = memory_of(config, model, share)
    print("memory per GPU in GiB, estimated:")
    for part, count in [*fixed.items(), *((f"{part}, per sequence", n) for part, n in per_sequence.items())]:
        print(f"  {part:36} {count / GIB:>8.3g}")
    usable = options.gpu_gb * 1e9 - GIB / 2             # half a GiB goes to the CUDA context

    def needs(fixed, micro_batch):
        return sum(fixed.values()) + micro_batch * sum(per_sequence.values())

    sizes = sorted({micro_batch_size(config, n, share) for n in batch_sizes(config)})
    most = max(batch_sizes(config)) // share
    fits = max((m for m in range(1, most + 1) if most % m == 0 and needs(fixed, m) <= usable), default=0)
    print(f"  in micro-batches of {' and '.join(map(str, sizes))}: {needs(fixed, max(sizes)) / GIB:.1f}; "
          f"the largest that fits {options.gpu_gb:g} GB, {usable / GIB:.1f} GiB usable: "
          f"{f'micro_batch={fits}' if fits else 'none fits'}")
    member = 2 * sum(p.numel() for p in model.parameters())
    own = dataclasses.replace(student_of(config), micro_batch=1)
    beside = needs(memory_of(own, model, options.ranks)[0], 1) - member
    print(f"  --student in micro-batches of 1: {beside / GIB:.1f} and {member / GIB:.2g} for each of its K "
          f"teachers; the most that fit: K={max(0, math.floor((usable - beside) / member))}")
    whole = memory_of(config, model, 1)[0]
    state = (whole["parameters (fp32; embedding bf16)"] + whole["AdamW"]
             + whole["Muon, this rank's share"])
    members, states = config.trajectories * config.cycles, 2 * config.trajectories + 1
    print(f"disk in GB: {members} members of {member / 1e9:.3g} = {members * member / 1e9:,.4g}; "
          f"{states} states of {state / 1e9:.3g} = {states * state / 1e9:,.4g}; "
          f"scores {members * 4 * held_out_tokens(config) / 1e9:,.4g}")


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    options.ranks = options.ranks or processes(config, most=8)
    for name in OPTIONS:
        value = getattr(options, name)
        if not 0 < value < 1e9 or name == "mfu" and value > 1:
            fail(f"{name}={value}: must be more than 0, and at most {1 if name == 'mfu' else 1e9:g}")
    if not can_share(config, options.ranks):
        fail(f"ranks={options.ranks}: cannot share the steps of this config equally; try "
             f"--ranks={processes(config, options.ranks)}")
    model, sequences = meta_model(config), sequences_per_epoch(config)
    print_model(model)
    print_cycles(config, sequences)
    print_cost(config, model, sequences, options)
    print_machine(config, model, options)


if __name__ == "__main__":
    main()
