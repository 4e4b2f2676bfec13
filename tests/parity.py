"""
Our code against what the public Slowrun script computes: python -m tests.parity FACTS.json [FACTS.json ...]
Rebuilds the inputs of a facts file from its seed, runs the code that trains on them, and prints a table of every
quantity; exits 1 where one is out, missing or unknown. tests/data/slowrun_facts.json is such a file (float32, CPU).
"""
import hashlib
import json
import re
import sys
import types
import zlib
from math import sqrt

import numpy as np
import torch

import distill
import train
from data import loader
from infra.console import fail
from model import GPT, GPTConfig
from optim import POLAR_EXPRESS, MuonAdamW
from prior import fit_weights

LR_SCALE = 0.25         # the recipe's, in which the facts' rates are given
VARIANTS = {"plain": ("iha", "mtp"), "iha": ("iha", "mtp"), "iha_mtp": ("iha", "mtp"), "iha_mtp_loop35": ("iha", "mtp", "loop")}
COMMON = ["resid_lambdas", "x0_lambdas", "skip_weights", "transformer.wte.weight", "transformer.h.0.attn.c_q.weight",
          "transformer.h.4.attn.k_mix", "transformer.h.5.mlp.c_proj.weight", "lm_head.weight", "ve_projs.3.weight",
          "mtp_proj.weight"]
GRADIENTS = COMMON + ["transformer.h.2.attn.attn_gate.weight", "transformer.h.3.attn.ve_gate.weight"]
STEPPED = COMMON + ["transformer.h.0.mlp.c_fc.weight"]

# The first rule whose pattern is found in the quantity's name: (pattern, measure, allowed). Without one: unknown.
# Ours is fp32 throughout; theirs has bf16 in Muon, hence the looser rules after a step. Half of what a change of
# 1 part in 1000 in a loss would be is the loosest rule for losses.
RULES = [
    (r"^(parameter_order|rates|data_order|batch|optimizer\.config)\b|params$|logits_shape$|\.shape$|_mult$", "exact", 0),
    (r"logits_mean$", "over std", 2e-5),
    (r"^forward.*grad_norm", "relative", 2e-4),
    (r"^(forward|distillation)\b", "relative", 2e-5),
    (r"steps\.0\.loss$", "relative", 2e-5),
    (r"steps\.0\.grad_norm$", "relative", 2e-4),
    (r"delta_norm|steps\.\d\.grad_norm$", "relative", 1e-2),
    (r"^optimizer.*(loss|param_norm|loss_after)", "relative", 5e-4),
    (r"^muon.*entries$", "largest, relative", 5e-2),
    (r"^muon", "relative", 3e-2),
    (r"^prior.*weights", "absolute", 1e-4),
    (r"^prior.*refitted", "ours above", 1e-6),
    (r"^prior\.adamw300|^prior\.top_k", "absolute", 1e-5),
    (r"^prior", "absolute", 1e-6),
    (r"^noise.*norm$", "relative", 1e-5),
    (r"^noise.*sum$", "over norm", 1e-4),
]


# ------------------------------------------------------------------------------------- the inputs

def fill(model, seed):
    """Weights by name, as the facts' README gives them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(p.shape))
            if name.endswith("_mix"):           w = np.eye(*p.shape) + 0.1 * z
            elif p.ndim < 2:                    w = 1 + 0.1 * z
            elif name.endswith("wte.weight"):   w = z
            elif name == "lm_head.weight":      w = 3 * z / sqrt(p.shape[1])
            else:                               w = z / sqrt(p.shape[1])
            p.copy_(torch.tensor(w, dtype=torch.float32))
    return model


def build(facts, seed, iha=True, mtp=0.3, loop=None):
    c = dict(facts["config"])
    if c.pop("n_kv_head") != c["n_head"]:
        raise KeyError("n_kv_head other than n_head")
    if loop:
        c.update(loop_start=loop[0], loop_end=loop[1], loop_extra=4)
    return fill(GPT(GPTConfig(**c, iha=iha, mtp_weight=mtp)), seed).train()


def token_batches(facts):
    return torch.tensor(np.random.default_rng([facts["seed"], 7]).integers(0, 257, size=(4, 2, 65)))


size = lambda tensor: tensor.detach().double().norm().item()


# ---------------------------------------------------------------- our side: a function for each part

def forward(facts):
    ours, batch = {}, token_batches(facts)[0]
    for name, inputs in VARIANTS.items():
        model = build(facts, facts["seed"], **{key: facts["forward"][name][key] for key in inputs})
        if facts["forward"][name]["mtp"] is None:
            raise KeyError("mtp")
        logits, ce = model(batch[:, :-1]), -model.log_p(batch[:, :-1], batch[:, 1:]).mean()
        loss = train.label_loss(model, batch)
        loss.backward()
        parameters = dict(model.named_parameters())
        ours[name] = dict(params=sum(p.numel() for p in parameters.values()), cross_entropy=ce.item(),
                          training_loss=loss.item(), logits_shape=list(logits.shape), logits_mean=logits.mean().item(),
                          logits_std=logits.std().item(), logits_0_5_first8=logits[0, 5, :8].tolist(),
                          grad_norm={n: size(parameters[n].grad) for n in GRADIENTS if n in parameters})
    return ours


def parameter_order(facts):
    return [name for name, _ in build(facts, facts["seed"]).named_parameters()]


def rates(facts):
    ours = {}
    for g in MuonAdamW(build(facts, facts["seed"]).named_parameters(), LR_SCALE).groups:
        keys = {"adamw": ("betas", "eps"), "muon": ("momentum", "beta2")}[g["kind"]]
        for name in g["names"]:
            ours[name] = dict(kind=g["kind"], lr=g["lr"], weight_decay=g["weight_decay"], **{k: g[k] for k in keys})
            if g["kind"] == "muon":
                ours[name]["ns_steps"] = len(POLAR_EXPRESS)
    return ours


def optimizer(facts):
    of = rates(facts)
    matrix = of["transformer.h.0.attn.c_q.weight"]
    config = dict(matrix_lr=matrix["lr"], scalar_lr=of["x0_lambdas"]["lr"], embedding_lr=of["transformer.wte.weight"]["lr"],
                  unembedding_lr=of["lm_head.weight"]["lr"], weight_decay=matrix["weight_decay"],
                  adam_betas=of["lm_head.weight"]["betas"], muon_momentum=matrix["momentum"], ns_steps=matrix["ns_steps"],
                  iha_lr=of["transformer.h.0.attn.q_mix"]["lr"])
    model, batches, steps = build(facts, facts["seed"]), token_batches(facts), []
    parameters = dict(model.named_parameters())
    start = {n: p.detach().clone() for n, p in parameters.items()}
    stepper = MuonAdamW(model.named_parameters(), LR_SCALE)
    for batch, theirs in zip(batches, facts["optimizer"]["steps"], strict=False):
        # the step of a cycle of length 1 at which our schedule has their learning rate
        multipliers = train.rate_multipliers("cycle", (1 - theirs["lr_mult"]) / (1 - train.LR_FLOOR), 1)
        loss, norm = train.train_step(model, stepper, (batch,), train.label_loss, multipliers)
        steps.append(dict(loss=loss.item(), grad_norm=norm.item(), lr_mult=multipliers[0], wd_mult=multipliers[1],
                          param_norm={n: size(parameters[n]) for n in STEPPED}))
    if len(steps) != 3:
        raise KeyError("three steps")
    return dict(config=config, steps=steps, loss_after=train.label_loss(model, batches[3]).item(),
                delta_norm={n: size(parameters[n] - start[n]) for n in STEPPED})


def muon(facts):
    f, matrices = facts["muon"], []
    for theirs in f["matrices"]:
        rows, cols = theirs["shape"]
        r = np.random.default_rng([facts["seed"], 13, rows, cols])
        p = torch.nn.Parameter(torch.tensor(r.standard_normal((rows, cols)) / sqrt(cols), dtype=torch.float32))
        start = p.detach().clone()
        scale = np.exp(r.uniform(-3, 3, size=(rows, 1))) * np.exp(r.uniform(-3, 3, size=(1, cols)))
        stepper = MuonAdamW([("matrix", p)], LR_SCALE)          # whose rate and decay are the facts'
        lr, decay = stepper.groups[0]["lr"], stepper.groups[0]["weight_decay"]
        for factor in (1, 0.3, 3, 0.1, 1, 10, 0.3, 1)[:f["steps"]]:
            p.grad = torch.tensor(r.standard_normal((rows, cols)) * scale * factor, dtype=torch.float32)
            stepper.step(1, 1)
        change = (p.detach() - start).double()
        norms = {"row_norms": change.norm(dim=1).tolist(), "column_norms": change.norm(dim=0).tolist()}
        matrices.append(dict(shape=[rows, cols], **norms, **{f"{k}.entries": v for k, v in norms.items()}))
        for k in norms:
            theirs[f"{k}.entries"] = theirs[k]
    if len(matrices) != 3:
        raise KeyError("three matrices")
    return dict(lr=lr, weight_decay=decay, steps=8, matrices=matrices)


def distillation(facts):
    f, batch = facts["distillation"], token_batches(facts)[0]
    student, teacher = build(facts, facts["seed"]), build(facts, f["teacher_seed"]).eval()
    with torch.no_grad():
        ce, mtp = student(batch[:, :-1], batch[:, 1:])
        kl = distill.distillation_kl(student(batch[:, :-1]).flatten(0, 1), teacher(batch[:, :-1]).flatten(0, 1),
                                     f["temperature"]) / batch[:, 1:].numel()
        total = distill.distilled_loss(student, [(teacher, 1.0)], batch, f["alpha"], f["temperature"])
    return dict(cross_entropy=ce.item(), mtp=mtp.item() / f["mtp_weight"], kl_times_T2=kl.item(), loss=total.item())


def adamw300(P):
    """The public script's fit, from torch's own AdamW: what it reaches is compared with the facts and with our optimum."""
    torch.manual_seed(0)
    alpha = (1e-4 * torch.randn(len(P))).requires_grad_()
    stepper = torch.optim.AdamW([alpha], lr=0.5, weight_decay=0.0)
    for _ in range(300):
        stepper.zero_grad()
        (-torch.log((alpha.softmax(0) @ P).clamp(min=1e-12)).mean()).backward()
        torch.nn.utils.clip_grad_norm_([alpha], 1.0)
        stepper.step()
    return alpha.detach().softmax(0).double()


def prior(facts):
    f, r = facts["prior"], np.random.default_rng([facts["seed"], 11])
    M, N = f["members"], f["tokens"]
    base, noise = r.normal(-3, 1.5, size=N), r.normal(0, 0.6, size=(M, N))
    handicap = np.linspace(0, 0.25, M)[r.permutation(M)]
    P = torch.tensor(np.exp(np.minimum(base + noise - handicap[:, None], -1e-3)))       # M, N float64
    log_p = P.log().float()
    loss = lambda w, rows=slice(None): -(torch.as_tensor(w, dtype=torch.float64) @ P[rows]).log().mean().item()
    theirs_w, (ours_w, _) = adamw300(P.float()), fit_weights(log_p)
    top_k = {}
    for K in ("1", "2", "4", "8", "12"):
        theirs = f["top_k"][K]
        tied = theirs_w.index_add(0, torch.tensor(theirs["members"]),
                                  torch.full((len(theirs["members"]),), 1e-5, dtype=torch.float64))
        chosen = tied.argsort(descending=True)[:int(K)].sort().values       # of weights within 1e-5, those they took
        learned = ours_w.argsort(descending=True, stable=True)[:int(K)]
        top_k[K] = {"members": chosen.tolist(), "weights": (theirs_w[chosen] / theirs_w[chosen].sum()).tolist(),
                    "loss": loss(theirs["weights"], theirs["members"]),
                    "loss, ours refitted": loss(fit_weights(log_p[learned])[0], learned)}
        theirs["loss, ours refitted"] = theirs["loss"]
    return dict(uniform_loss=loss(np.full(M, 1 / M)), best_single=min(loss(e) for e in np.eye(M)), adamw300_loss=loss(theirs_w),
                adamw300_weights=theirs_w.tolist(), optimum_loss=loss(ours_w), optimum_weights=ours_w.tolist(), top_k=top_k)


def data_order(facts):
    f, r, seed = facts["data_order"], np.random.default_rng([facts["seed"], 17]), facts["seed"]
    lengths = r.integers(20, 400, size=f["documents"])
    tokens = np.concatenate([np.append(f["bos_id"], r.integers(0, 256, size=n - 1)) for n in lengths]).astype(np.uint16)
    fitness, rest, starts = loader.split_fitness(tokens, np.append(0, np.cumsum(lengths)[:-1]), f["fitness_tokens"])
    sha = lambda a: hashlib.sha256(a.astype("<u2").tobytes()).hexdigest()
    sequences, trajectories = loader.cut(fitness, f["sequence_len"]), []
    for t in range(2):
        cuts = types.SimpleNamespace(sequence_len=f["sequence_len"], epoch_multiple=f["multiple"])
        data = types.SimpleNamespace(train=rest, doc_starts=starts, sequences_per_epoch=loader.sequences_per_epoch(cuts, len(rest)))
        batches, epochs = loader.Batches(data, f["sequence_len"], seed + t), []
        for epoch in (1, 2, 3):
            rows = batches.take(batches.per_epoch).numpy()
            epochs.append(dict(epoch=epoch, sequences=len(rows), first_8_tokens=rows[0, :8].tolist(), sha256=sha(rows)))
        trajectories.append(dict(trajectory=t, seed_t=seed + t, epochs=epochs))
    held = dict(documents=len(lengths) - len(starts), tokens=len(fitness), sequences=len(sequences), sha256=sha(sequences))
    return dict(documents=300, tokens=len(tokens), bos_id=256, sequence_len=64, multiple=16, fitness_tokens=5000,
                fitness=held, trajectories=trajectories)


def noise(facts):
    f, model = facts["noise"], build(facts, facts["seed"])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train.perturb(model, f["scale"], train.noise_seed(f["seed_t"], f["cycle"]))
    change = {n: (p.detach() - start[n]).double() for n, p in model.named_parameters()}
    return dict(parameters={n: dict(norm=size(d), sum=d.sum().item()) for n, d in change.items()})


PARTS = (forward, parameter_order, rates, optimizer, muon, distillation, prior, data_order, noise)
# What a facts file gives, and ours takes: altered, the results above are out.
INPUTS = {"seed", "torch", "distillation.alpha", "distillation.temperature", "distillation.mtp_weight",
          "distillation.teacher_seed", "prior.members", "prior.tokens", "noise.scale", "noise.cycle", "noise.seed_t",
          *(f"config.{k}" for k in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout")),
          *(f"forward.{v}.{k}" for v, keys in VARIANTS.items() for k in keys)}


# -------------------------------------------------------------------------------------- the comparison

def flatten(value, name=""):
    """Nested dicts and lists of dicts -> {dotted name: number, text or flat list}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {name: list(value) if isinstance(value, tuple) else value}
    return {k: v for key, item in items for k, v in flatten(item, f"{name}.{key}".lstrip(".")).items()}


def difference(measure, ours, theirs, scale):
    if measure == "exact":
        close = lambda a, b: a == b or type(a) is type(b) is float and abs(a - b) <= 1e-12 * abs(b)     # 0.25 * 0.04
        return 0.0 if close(ours, theirs) else float("inf")
    if measure.startswith("over") and not scale:
        return float("inf")
    try:
        a, b = (np.atleast_1d(np.asarray(z, dtype=np.float64)) for z in (ours, theirs))
    except (ValueError, TypeError):
        return float("inf")
    if a.shape != b.shape:
        return float("inf")
    return {"relative": lambda: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300), "absolute": lambda: abs(a - b).max(),
            "largest, relative": lambda: (abs(a - b) / abs(b)).max(), "ours above": lambda: (a - b).max(),
            "over std": lambda: abs(a - b).max() / scale, "over norm": lambda: abs(a - b).max() / scale}[measure]()


def compare(facts):
    """[(quantity, theirs, ours, difference, allowed)]; a difference that is not <= allowed (inf, None allowed) is out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    facts, ours, rows = json.loads(json.dumps(facts)), {}, []
    for part in PARTS:
        try:
            ours.update(flatten(part(facts), part.__name__))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            rows.append((part.__name__, f"wrong or missing: {type(e).__name__} {e}", "", float("inf"), 0))
    torch.set_num_threads(threads)
    ours["batch"] = [2, facts.get("config", {}).get("sequence_len")]
    theirs = flatten(facts)
    for name in dict.fromkeys([*theirs, *ours, *sorted(INPUTS)]):
        if name in INPUTS and name in theirs:
            continue
        rule = next(((measure, allowed) for pattern, measure, allowed in RULES if re.search(pattern, name)), None)
        if name not in ours or name not in theirs or rule is None:
            what = "unknown" if name not in ours or rule is None else "missing"
            rows.append((name, theirs.get(name, what), ours.get(name, what), float("inf"), 0))
            continue
        scale = {"over std": theirs.get(name.replace("_mean", "_std")),
                 "over norm": theirs.get(name[:-3] + "norm")}.get(rule[0])
        rows.append((name, theirs[name], ours[name], float(difference(rule[0], ours[name], theirs[name], scale)), rule[1]))
    return rows


def main(paths):
    out = 0
    for path in paths or fail("no facts: python -m tests.parity tests/data/slowrun_facts.json"):
        try:
            with open(path) as f:
                facts = dict(json.load(f))
        except (OSError, ValueError, TypeError) as e:
            fail(f"{path} is no facts file ({type(e).__name__}): tests/data/slowrun_facts.json is one")
        rows = compare(facts)
        short = lambda v: (f"{v:.6g}" if isinstance(v, float) else str(v))[:24]
        print(f"{path}\n{'quantity':66} {'theirs':>24} {'ours':>24} {'difference':>10} {'allowed':>8}")
        for name, theirs, ours, d, allowed in rows:
            print(f"{name:66} {short(theirs):>24} {short(ours):>24} {d:>10.2e} {allowed:>8.0e}"
                  f"{'' if d <= allowed else '   OUT'}")
        bad = [name for name, _, _, d, allowed in rows if not d <= allowed]
        print(f"{len(rows)} quantities, {len(bad)} out, missing or unknown{': ' + ', '.join(bad[:20]) if bad else ''}")
        out += len(bad)
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
