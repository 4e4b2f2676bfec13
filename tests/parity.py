"""
Our code against what the public Slowrun script computes: python -m tests.parity FACTS.json [FACTS.json ...]
Rebuilds the inputs of a facts file from its seed, runs the code that trains on them, and prints a table of
every quantity; exits 1 where one is out, missing or unknown. tests/data/slowrun_facts.json is such a file
(float32, CPU).
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
VARIANTS = "plain", "iha", "iha_mtp", "iha_mtp_loop35"
COMMON = ["resid_lambdas", "x0_lambdas", "skip_weights", "transformer.wte.weight", "lm_head.weight",
          "ve_projs.3.weight", "mtp_proj.weight", "transformer.h.0.attn.c_q.weight",
          "transformer.h.4.attn.k_mix", "transformer.h.5.mlp.c_proj.weight"]
GRADIENTS = [*COMMON, "transformer.h.2.attn.attn_gate.weight", "transformer.h.3.attn.ve_gate.weight"]
STEPPED = [*COMMON, "transformer.h.0.mlp.c_fc.weight"]
# What a facts file gives, and ours takes: altered or missing, the results are out.
INPUTS = (r"seed|torch|config\..*|distillation\.(alpha|temperature|mtp_weight|teacher_seed)|"
          r"prior\.(members|tokens)|noise\.(scale|cycle|seed_t)|forward\.\w+\.(iha|mtp|loop)")

# The first rule whose pattern is in the quantity's name: (pattern, measure, allowed). Without one: unknown.
# Ours is fp32 throughout; theirs has bf16 in Muon, hence the looser rules after a step. Half of what a change
# of 1 part in 1000 in a loss would be is the loosest rule for losses.
RULES = [
    (r"^(parameter_order|rates|data_order|batch|optimizer\.config)\b|params$|shape$|_mult$", "exact", 0),
    (r"logits_mean$", "over scale", 2e-5),
    (r"^forward.*grad_norm|steps\.0\.grad_norm$", "relative", 2e-4),
    (r"^(forward|distillation)\b|steps\.0\.loss$", "relative", 2e-5),
    (r"delta_norm|steps\.\d\.grad_norm$", "relative", 1e-2),
    (r"^optimizer.*(loss|param_norm|loss_after)", "relative", 5e-4),
    (r"^muon.*entries$", "largest, relative", 5e-2),
    (r"^muon", "relative", 3e-2),
    (r"^prior.*weights", "absolute", 1e-4),
    (r"^prior.*refitted", "ours above", 1e-6),
    (r"^prior\.adamw300|^prior\.top_k", "absolute", 1e-5),
    (r"^prior", "absolute", 1e-6),
    (r"^noise.*norm$", "relative", 1e-5),
    (r"^noise.*sum$", "over scale", 1e-4),
]
MEASURES = {            # of ours, theirs, and for a mean or sum near 0 its scale, their deviation or norm
    "exact": lambda a, b, scale: 0 if np.allclose(a, b, rtol=1e-12, atol=0) else np.inf,    # 0.25 * 0.04
    "relative": lambda a, b, scale: np.linalg.norm(a - b) / np.linalg.norm(b),
    "largest, relative": lambda a, b, scale: (abs(a - b) / abs(b)).max(),
    "absolute": lambda a, b, scale: abs(a - b).max(),
    "over scale": lambda a, b, scale: abs(a - b) / scale,
    "ours above": lambda a, b, scale: a - b,
}


# ------------------------------------------------------------------------------------- the inputs

def weight(name, shape, seed):
    """As the facts' README gives it: from a generator of its own."""
    z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("_mix"):
        return np.eye(*shape) + 0.1 * z
    if len(shape) < 2:
        return 1 + 0.1 * z
    if name.endswith("wte.weight"):
        return z
    return (3 * z if name == "lm_head.weight" else z) / sqrt(shape[1])


def build(facts, seed, iha=True, mtp=0.3, loop=(0, 0)):
    c = dict(facts["config"])
    if c.pop("n_kv_head") != c["n_head"]:
        raise KeyError("n_kv_head other than n_head")
    loops = dict(loop_start=loop[0], loop_end=loop[1], loop_extra=4)
    model = GPT(GPTConfig(**c, **loops, iha=iha, mtp_weight=mtp)).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(weight(name, tuple(p.shape), seed), dtype=torch.float32))
    return model


def token_batches(facts):
    return torch.tensor(np.random.default_rng([facts["seed"], 7]).integers(0, 257, size=(4, 2, 65)))


def size(tensor):
    return tensor.detach().double().norm().item()


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---------------------------------------------------------------- our side: a function for each part

def forward(facts):
    ours, batch = {}, token_batches(facts)[0]
    for name in VARIANTS:
        of = facts["forward"][name]
        model = build(facts, facts["seed"], of["iha"], of["mtp"], of["loop"] if "loop" in name else (0, 0))
        logits, ce = model(batch[:, :-1]), -model.log_p(batch[:, :-1], batch[:, 1:]).mean()
        loss = train.label_loss(model, batch)
        loss.backward()
        parameters = dict(model.named_parameters())
        ours[name] = dict(
            params=sum(p.numel() for p in parameters.values()), cross_entropy=ce.item(),
            training_loss=loss.item(), logits_shape=list(logits.shape), logits_mean=logits.mean().item(),
            logits_std=logits.std().item(), logits_0_5_first8=logits[0, 5, :8].tolist(),
            grad_norm={n: size(parameters[n].grad) for n in GRADIENTS if n in parameters})
    return ours


def parameter_order(facts):
    return list(weights_of(build(facts, facts["seed"])))


def rates(facts):
    ours = {}
    for g in MuonAdamW(build(facts, facts["seed"]).named_parameters(), LR_SCALE).groups:
        keys = {"adamw": ("betas", "eps"), "muon": ("momentum", "beta2", "ns_steps")}[g["kind"]]
        g["ns_steps"] = len(POLAR_EXPRESS)
        ours |= dict.fromkeys(g["names"], {key: g[key] for key in ("kind", "lr", "weight_decay", *keys)})
    return ours


def optimizer(facts):
    of = rates(facts)
    matrix, head = of["transformer.h.0.attn.c_q.weight"], of["lm_head.weight"]
    config = dict(
        matrix_lr=matrix["lr"], scalar_lr=of["x0_lambdas"]["lr"], unembedding_lr=head["lr"],
        embedding_lr=of["transformer.wte.weight"]["lr"], iha_lr=of["transformer.h.0.attn.q_mix"]["lr"],
        weight_decay=matrix["weight_decay"], adam_betas=head["betas"], muon_momentum=matrix["momentum"],
        ns_steps=matrix["ns_steps"])
    model, batches, steps = build(facts, facts["seed"]), token_batches(facts), []
    start, stepper = weights_of(model), MuonAdamW(model.named_parameters(), LR_SCALE)
    for i in range(3):
        # the step of a cycle of length 1 at which our schedule has their learning rate
        at = (1 - facts["optimizer"]["steps"][i]["lr_mult"]) / (1 - train.LR_FLOOR)
        multipliers = train.rate_multipliers("cycle", at, 1)
        loss, norm = train.train_step(model, stepper, batches[i:i + 1], train.label_loss, multipliers)
        now = weights_of(model)
        steps.append(dict(loss=loss.item(), grad_norm=norm.item(), lr_mult=multipliers[0],
                          wd_mult=multipliers[1], param_norm={n: size(now[n]) for n in STEPPED}))
    return dict(config=config, steps=steps, loss_after=train.label_loss(model, batches[3]).item(),
                delta_norm={n: size(now[n] - start[n]) for n in STEPPED})


def muon(facts):
    matrices = []
    for i in range(3):
        theirs = facts["muon"]["matrices"][i]
        rows, cols = theirs["shape"]
        r = np.random.default_rng([facts["seed"], 13, rows, cols])
        start = torch.tensor(r.standard_normal((rows, cols)) / sqrt(cols), dtype=torch.float32)
        scale = np.exp(r.uniform(-3, 3, size=(rows, 1))) * np.exp(r.uniform(-3, 3, size=(1, cols)))
        p = torch.nn.Parameter(start.clone())
        stepper = MuonAdamW([("matrix", p)], LR_SCALE)          # whose rate and decay are the facts'
        for factor in (1, 0.3, 3, 0.1, 1, 10, 0.3, 1):
            p.grad = torch.tensor(r.standard_normal((rows, cols)) * scale * factor, dtype=torch.float32)
            stepper.step(1, 1)
        change = (p.detach() - start).double()
        norms = {"row_norms": change.norm(dim=1).tolist(), "column_norms": change.norm(dim=0).tolist()}
        matrices.append(dict(shape=[rows, cols], **norms, **{f"{k}.entries": v for k, v in norms.items()}))
        theirs |= {f"{k}.entries": theirs[k] for k in norms}    # compared as a whole, and one by one
    return dict(lr=stepper.groups[0]["lr"], weight_decay=stepper.groups[0]["weight_decay"], steps=8,
                matrices=matrices)


def distillation(facts):
    f, batch = facts["distillation"], token_batches(facts)[0]
    student, teacher = build(facts, facts["seed"]), build(facts, f["teacher_seed"]).eval()
    with torch.no_grad():
        ce, mtp = student(batch[:, :-1], batch[:, 1:])
        logits = (model(batch[:, :-1]).flatten(0, 1) for model in (student, teacher))
        kl = distill.distillation_kl(*logits, f["temperature"]) / batch[:, 1:].numel()
        total = distill.distilled_loss(student, [(teacher, 1.0)], batch, f["alpha"], f["temperature"])
    return dict(cross_entropy=ce.item(), mtp=mtp.item() / f["mtp_weight"], kl_times_T2=kl.item(),
                loss=total.item())


def adamw300(P):
    """The public script's fit, by torch's own AdamW: compared with the facts and with our optimum."""
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

    def loss(w, rows=slice(None)):
        return -(torch.as_tensor(w, dtype=torch.float64) @ P[rows]).log().mean().item()
    theirs_w, ours_w = adamw300(P.float()), fit_weights(log_p)[0]
    top_k = {}
    for K in (1, 2, 4, 8, 12):
        theirs = f["top_k"][str(K)]
        tied = theirs_w.clone()                     # of weights within 1e-5, those they took
        tied[theirs["members"]] += 1e-5
        chosen = tied.argsort(descending=True)[:K].sort().values
        learned = ours_w.argsort(descending=True, stable=True)[:K]
        weights = theirs_w[chosen] / theirs_w[chosen].sum()
        top_k[K] = {"members": chosen.tolist(), "weights": weights.tolist(),
                    "loss": loss(theirs["weights"], theirs["members"]),
                    "loss, ours refitted": loss(fit_weights(log_p[learned])[0], learned)}
        theirs["loss, ours refitted"] = theirs["loss"]
    return dict(uniform_loss=loss(np.full(M, 1 / M)), best_single=min(loss(e) for e in np.eye(M)),
                adamw300_loss=loss(theirs_w), adamw300_weights=theirs_w.tolist(), optimum_loss=loss(ours_w),
                optimum_weights=ours_w.tolist(), top_k=top_k)


def sha256(sequences):
    return hashlib.sha256(sequences.astype("<u2").tobytes()).hexdigest()


def data_order(facts):
    r, seed = np.random.default_rng([facts["seed"], 17]), facts["seed"]
    lengths = r.integers(20, 400, size=300)
    documents = [np.append(256, r.integers(0, 256, size=n - 1)) for n in lengths]
    tokens = np.concatenate(documents).astype(np.uint16)
    fitness, rest, starts = loader.split_fitness(tokens, np.append(0, np.cumsum(lengths)[:-1]), 5000)
    config = types.SimpleNamespace(sequence_len=64, epoch_multiple=16)
    data = types.SimpleNamespace(train=rest, doc_starts=starts,
                                 sequences_per_epoch=loader.sequences_per_epoch(config, len(rest)))
    sequences, trajectories = loader.cut(fitness, 64), []
    for t in range(2):
        batches, epochs = loader.Batches(data, 64, seed + t), []
        for epoch in (1, 2, 3):
            rows = batches.take(batches.per_epoch).numpy()
            epochs.append(dict(epoch=epoch, sequences=len(rows), first_8_tokens=rows[0, :8].tolist(),
                               sha256=sha256(rows)))
        trajectories.append(dict(trajectory=t, seed_t=seed + t, epochs=epochs))
    held = dict(documents=len(lengths) - len(starts), tokens=len(fitness), sequences=len(sequences),
                sha256=sha256(sequences))
    return dict(documents=300, tokens=len(tokens), bos_id=256, sequence_len=64, multiple=16,
                fitness_tokens=5000, fitness=held, trajectories=trajectories)


def noise(facts):
    f, model = facts["noise"], build(facts, facts["seed"])
    start = weights_of(model)
    train.perturb(model, f["scale"], train.noise_seed(f["seed_t"], f["cycle"]))
    added = {n: (w - start[n]).double() for n, w in weights_of(model).items()}
    return dict(parameters={n: dict(norm=size(d), sum=d.sum().item()) for n, d in added.items()})


PARTS = (forward, parameter_order, rates, optimizer, muon, distillation, prior, data_order, noise)


# -------------------------------------------------------------------------------------- the comparison

def flatten(value, name=""):
    """Nested dicts and lists of dicts -> {dotted name: number, text or flat list}."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: list(value) if isinstance(value, tuple) else value}
    inside = (flatten(item, f"{name}.{key}".lstrip(".")) for key, item in value.items())
    return {name: number for of_one in inside for name, number in of_one.items()}


def difference(measure, ours, theirs, scale):
    """By one of MEASURES; infinite where there is none, or the two are not of one kind."""
    if measure == "exact" and ours == theirs:
        return 0
    try:
        a, b = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
        return float(MEASURES[measure](a, b, scale)) if a.shape == b.shape else np.inf
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return np.inf


def compare(facts):
    """[(quantity, theirs, ours, difference, allowed)]; one that is not <= allowed (NaN, too) is out."""
    facts, ours, rows = json.loads(json.dumps(facts)), {}, []
    for part in PARTS:
        try:
            ours |= flatten(part(facts), part.__name__)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            rows.append((part.__name__, f"wrong or missing: {type(e).__name__} {e}", "", np.inf, 0))
    ours["batch"] = [2, facts.get("config", {}).get("sequence_len")]
    theirs = flatten(facts)
    for name in dict.fromkeys([*theirs, *ours]):
        if re.fullmatch(INPUTS, name):
            continue
        given, found = theirs.get(name, "missing"), ours.get(name, "unknown")
        _, measure, allowed = next((rule for rule in RULES if re.search(rule[0], name)), ("", "none", 0))
        scale = theirs.get(re.sub("_mean$", "_std", re.sub("sum$", "norm", name)))
        rows.append((name, given, found, difference(measure, found, given, scale), allowed))
    return rows


def short(value):
    return (f"{value:.6g}" if isinstance(value, float) else str(value))[:24]


def main(paths):
    torch.set_num_threads(1)
    out = 0
    for path in paths or fail("no facts: python -m tests.parity tests/data/slowrun_facts.json"):
        try:
            with open(path) as f:
                facts = dict(json.load(f))
        except (OSError, ValueError, TypeError) as e:
            fail(f"{path} is no facts file ({type(e).__name__}): tests/data/slowrun_facts.json is one")
        rows, bad = compare(facts), []
        print(f"{path}\n{'quantity':66} {'theirs':>24} {'ours':>24} {'difference':>10} {'allowed':>8}")
        for name, theirs, ours, d, allowed in rows:
            mark = "" if d <= allowed else "   OUT"
            bad += [name] if mark else []
            print(f"{name:66} {short(theirs):>24} {short(ours):>24} {d:>10.2e} {allowed:>8.0e}{mark}")
        named = f": {', '.join(bad[:20])}" if bad else ""
        print(f"{len(rows)} quantities, {len(bad)} out, missing or unknown{named}")
        out += len(bad)
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
