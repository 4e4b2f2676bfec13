"""
A small population trained by the public Slowrun script's own code and by ours, every step compared:
    python -m tests.end_to_end THEIRS [--mutants]       (THEIRS: a clone of github.com/qlabs-eng/slowrun)
Their main() runs as it is, on the CPU over gloo; ours as train.py and distill.py under torchrun. Both begin
with the weights that theirs drew, draw the same dropout masks, and compute in float64, where rounding hides
nothing: a difference above LIMIT is another computation. --mutants: also ours with one thing changed on
purpose; every change must show. Exit code 1 where one does not, or where a difference is too large.
"""
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist

from infra.console import FAILED, ROOT, fail, script

COMMIT = "a200723a72510f51adcec85224933d4c205a53fb"         # the last that changed unlimited/, 2026-05-28
SHA256 = "c1d8e4973fa677a78a165ed6946b3b301745ef4c047057db4a1e72af61e3bdec"     # of its unlimited/train.py

LIMIT, ULP = 1e-8, 2.0 ** -52                           # relative
LAYERS, HEADS, WIDTH, T, LOOP, MTP, SEED, TOKENS = 6, 4, 64, 64, (3, 5), 0.3, 42, 8000
FITNESS, VALIDATION = 24 * (T + 1), 32 * (T + 1)        # theirs leaves out what is no multiple of 8 sequences
PEAK, ENDS, DISTILL_FROM = 12 * T, 8 * T, 2             # tokens of a step, in the middle cycles and else
TAU, LR = 0.6, 1.2                                      # epochs of a cycle; the record's LR is 0.25
# N trajectories of C cycles, G ranks of each, B sequences of a backward pass; dropout only where G is 1
SCENARIOS = {
    "one rank": dict(N=2, C=6, G=1, B=4, dropout=0.1),
    "two ranks": dict(N=1, C=5, G=2, B=2, dropout=0.0),
    "mutants": dict(N=1, C=4, G=1, B=4, dropout=0.1),
}
MUTANTS = [             # (what is changed, the file, {a text that occurs once: another})
    ("one step more in every cycle", "train.py", {"[max(1, round(": "[1 + max(1, round("}),
    ("rates of the next step", "train.py", {"(config.schedule, at, ": "(config.schedule, at + 1, "}),
    ("gradients not clipped", "train.py", {".parameters(), 1.0)": ".parameters(), 1e9)"}),
    ("noise before the member is kept", "train.py", {
        "step.first and step.cycle > 0": "False", " trajectory.save_member(":
        " [trajectory.restart(c) for c in [step.cycle + 1] if c < config.cycles]; trajectory.save_member("}),
    ("biased standard deviation in the noise", "train.py", {".std())": ".std(correction=0))"}),
    ("moments lost between cycles", "train.py", {" perturb(self":
        " [x.zero_() for xs in self.optimizer.moments().values() for x in xs]; perturb(self"}),
    ("every epoch permutes the file's own order", "data/loader.py", {"range(1, epoch": "range(epoch, epoch"}),
    ("an epoch cut before its permutation", "data/loader.py", {"len(sequences), SEQ": "self.per_epoch, SEQ"}),
    ("MTP at its full weight in distillation", "distill.py", {"(1 - alpha) * mtp": "mtp"}),
    ("the teacher's term without T^2", "distill.py", {"temperature ** 2 * ": ""}),
    ("a teacher one cycle older", "distill.py", {"return cycle - 1": "return max(0, cycle - 2)"}),
    ("members not rounded to bf16", "infra/run_directory.py", {'"cpu", torch.bfloat16,': '"cpu",'}),
    ("decay not cautious", "optim.py", {" * (updates * weights >= 0)": ""}),
    ("NorMuon's other side of square matrices", "optim.py", {
        "g.size(-2) >= g": "g.size(-2) > g", "(n, rows, 1) if rows >= ": "(n, rows, 1) if rows > "}),
    ("x0_lambdas with the others' betas", "optim.py", {"betas=(0.96, ": "betas=(0.8, "}),
    ("lr_scale on the head mixes, too", "optim.py", {"], IHA_LR)": "], IHA_LR * lr_scale)"}),
]


def changed(path, edits):
    """The text of a file with these texts in it changed."""
    source = path.read_text()
    for old, new in edits.items():
        if source.count(old) != 1:
            fail(f"'{path}' has {source.count(old)} times '{old}', not once: adapt tests/end_to_end.py")
        source = source.replace(old, new)
    return source


def load(path, name, edits):
    """Import a file under this name, with these texts changed."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(changed(path, edits), path, "exec"), vars(module))
    return module


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Record:
    """What a rank sees of its trajectory: lists over steps, over noises, over cycles."""

    def __init__(self):
        self.losses, self.norms, self.rates, self.sequences = [], [], [], []
        self.noise, self.cycles, self.teacher, self.optimizer, self.place = [], [], None, None, [0, 0]

    def add_step(self, loss, norm, micro_batches):
        self.losses.append(float(loss))
        self.norms.append(float(norm))
        self.sequences.append([row.numpy().tobytes() for rows in micro_batches for row in rows])

    def end_cycle(self, model, moments, **losses):
        teacher = weights_of(self.teacher) if self.teacher else {}
        moments = {name: x.clone() for name, x in moments.items()}
        self.cycles.append(dict(weights=weights_of(model), moments=moments, teacher=teacher, **losses))

    def perturbing(self, perturb):
        def recorded(model, scale, seed):
            before = weights_of(model)
            perturb(model, scale, seed=seed)
            self.noise.append((scale, seed, {n: w - before[n] for n, w in weights_of(model).items()}))
        return recorded

    def dropout(self, x, p=0.5, training=True, inplace=False):
        """Of a mask that depends on self.place alone: steps done, and how many masks the step has drawn."""
        if not training or p == 0:
            return x
        generator = torch.Generator().manual_seed(10_000 * self.place[0] + self.place[1])
        self.place[1] += 1
        return x * (torch.rand(x.shape, generator=generator) >= p) / (1 - p)


# ------------------------------------------------------------------------------------ theirs, one rank

def moments_of(optimizer, model):
    names, moments = {id(p): name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"]]
        if group["kind"] == "adamw":
            pairs = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        else:
            pairs = zip(states[0]["momentum_buffer"], states[0]["second_momentum_buffer"])
        moments |= {f"{kind}.{names[id(p)]}": x for p, pair in zip(group["params"], pairs)
                    for kind, x in zip("mv", pair)}
    return moments


def hook_steps(up, record):
    """Record sequences, loss, gradient norm and rates of their steps, and the optimizer."""
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    following, step, parts, batches = up.DataLoader.__next__, up.MuonAdamW.step, [], []

    def recorded_next(loader):
        x, y, epoch = following(loader)
        if loader.doc_shuffle:              # else it is validation text
            batches.append(torch.cat([x, y[:, -1:]], dim=1))
        return x, y, epoch

    def recorded_backward(loss):
        parts.append(loss.item())
        backward(loss)

    def recorded_clip(*args, **options):
        norm = clip(*args, **options)
        record.add_step(sum(parts), norm, batches[:len(parts)])         # one more has been fetched
        record.place[:] = len(record.norms), 0
        del batches[:len(parts)], parts[:]
        return norm

    def recorded_step(optimizer):
        g, record.optimizer = optimizer.param_groups[-1], optimizer
        record.rates.append([g[rate] / g[f"initial_{rate}"] for rate in ("lr", "weight_decay")])
        step(optimizer)

    up.DataLoader.__next__, up.MuonAdamW.step = recorded_next, recorded_step
    torch.Tensor.backward, torch.nn.utils.clip_grad_norm_ = recorded_backward, recorded_clip


def hook_models(up, record, spec):
    """Save their first weights, note the teacher, and compute exactly where they would round to bf16."""
    init, answer, muon = up.GPT.init_weights, up.GPT.forward_logits, up.muon_step_fused

    def init_weights(model):
        init(model)
        if record.norms:                    # a teacher's, which get others
            return
        trajectory, rank = divmod(dist.get_rank(), spec["G"])
        if rank == 0:
            torch.save(model.state_dict(), Path(spec["first"]) / f"first_{SEED + trajectory}.pt")
        for p in model.parameters():
            p.data *= 1 + spec["off"] * torch.randn_like(p)

    def forward_logits(model, idx):
        if model.lm_head.weight.dtype is not torch.bfloat16:
            return answer(model, idx)
        record.teacher = model              # its weights stay rounded
        weights = {name: p.float() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (idx,))

    def exact_muon(*args):
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon(*args)

    up.GPT.init_weights, up.GPT.forward_logits = init_weights, forward_logits
    up.muon_step_fused = exact_muon


def theirs(spec, record):
    """Their main(), without GPU, compiler and account, with a tokenizer of bytes."""
    encoding = MagicMock(n_vocab=257, _special_tokens={"<|endoftext|>": 256},
                         decode_single_token_bytes=lambda i: bytes([i]))
    sys.modules |= dict(wandb=MagicMock(), tiktoken=MagicMock(get_encoding=lambda name: encoding))
    join, torch.cuda.set_device = dist.init_process_group, print
    dist.init_process_group = lambda backend, timeout, **_: join("gloo", timeout=timeout)
    torch.compile = lambda f=None, **_: f or torch.compile              # also as a decorator
    folder, sys.argv = Path(spec["public"]), ["train.py", *spec["argv"]]
    sys.path.insert(0, str(folder))
    up = load(folder / "train.py", "public_script", {'"cuda", local_rank': '"cpu"'})
    up.BOS_ID, up.MAX_SEQ_LEN, ddp, losses = 256, T, up.DDP, {}
    up.DDP = lambda model, device_ids, **options: ddp(model, **options)
    hook_steps(up, record)
    hook_models(up, record, spec)
    evaluate, fitness = up.evaluate_bpb, up.cache_pgt_single_model

    def recorded_evaluate(*args, **options):
        bits, losses["validation"] = evaluate(*args, **options)
        return bits, losses["validation"]

    def recorded_fitness(model, *args, **options):      # the last thing of a cycle, before the noise
        p = fitness(model, *args, **options)
        losses["fitness"] = -p.log().mean().item()
        record.end_cycle(model, moments_of(record.optimizer, model), **losses)
        return p

    up.evaluate_bpb, up.cache_pgt_single_model = recorded_evaluate, recorded_fitness
    up.perturb_weights = record.perturbing(up.perturb_weights)
    up.main()


# -------------------------------------------------------------------------------------- ours, one rank

def ours(spec, record):
    if spec["file"]:                        # before what imports it
        load(ROOT / spec["file"], spec["file"].removesuffix(".py").replace("/", "."), spec["edits"])
    import distill
    import model
    import optim
    import train
    from data import loader
    from infra.config import from_args
    config = from_args(spec["argv"], "")[0]
    data, step, distilled = loader.load(config), train.train_step, distill.distilled_loss
    steps = train.schedule(config, data.sequences_per_epoch)
    model.CHUNK_BYTES["cpu"], optim.STACK = 4 * 257 * 100, 3 * WIDTH ** 2       # in parts, as larger models

    def first_weights(gpt):
        gpt.load_state_dict(torch.load(Path(spec["first"]) / f"first_{torch.initial_seed()}.pt"))
        return gpt

    def recorded_step(gpt, optimizer, micro_batches, loss_fn, rates):
        record.place[:] = optimizer.steps, 0
        for g in optimizer.groups:          # torch's fused step wants its counts in float32
            g["steps"] = [count.to(torch.float) for count in g.get("steps", [])]
        loss, norm = step(gpt, optimizer, micro_batches, loss_fn, rates)
        record.add_step(loss, norm, micro_batches)
        record.rates.append(rates)
        if steps[optimizer.steps - 1].last:
            gpt = getattr(gpt, "module", gpt)
            record.end_cycle(gpt, optimizer.moments(), fitness=-loader.score(gpt, data.fit, 4).mean().item(),
                             validation=-loader.score(gpt, data.val, 4).mean().item())
        return loss, norm

    def recorded_loss(student, teachers, *args):
        record.teacher = teachers[0][0]
        return distilled(student, teachers, *args)

    model.GPT.init_weights, distill.distilled_loss = first_weights, recorded_loss
    train.train_step, train.perturb = recorded_step, record.perturbing(train.perturb)
    for name in spec["scripts"]:
        dict(train=train, distill=distill)[name].main(spec["argv"])


def worker(path):
    """One rank. Its record goes beside the file that says what to do."""
    spec, rank, record = json.loads(Path(path).read_text()), int(os.environ["RANK"]), Record()
    torch.nn.functional.dropout = record.dropout
    torch.set_default_dtype(torch.float64)  # and what asks for float32 gets float64
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    (theirs if "public" in spec else ours)(spec, record)
    del record.teacher, record.optimizer, record.place
    torch.save(vars(record), f"{path}.{rank}")


def write_data(folder):
    """The Python manual in documents of about 200 tokens; the first is the fitness set and a bit more."""
    text = "".join(json.loads(line)["text"] for line in (ROOT / "data" / "manual.jsonl").open()).encode()
    first, generator = FITNESS + 2 * (T + 1), torch.Generator().manual_seed(SEED)
    for split, size in dict(val=VALIDATION, train=TOKENS).items():
        more = first + torch.randperm(size - first, generator=generator)[:size // 200]
        starts = torch.cat([torch.tensor([0, first]), more]).unique()
        tokens, text = torch.tensor([*text[:size]]), text[size:]
        tokens[starts] = 256
        torch.save(dict(tokens=tokens.to(torch.uint16), doc_starts=starts, bos_id=256, seq_shuffle_seed=0,
                        seq_size=T + 1), folder / f"text_{split}.pt")


def their_arguments(s, data, out):
    return f"""--n_layer={LAYERS} --n_head={HEADS} --n_embd={WIDTH} --mtp-weight={MTP} --seed={SEED}
        --dropout={s['dropout']} --dupe-layers-start={LOOP[0]} --dupe-layers-end={LOOP[1]}
        --num-models={s['N'] * s['C']} --gpus-per-node={s['G']} --device-batch-size={s['B']}
        --epochs-per-cycle={TAU} --lr_multiplier={LR} --total-batch-size={PEAK} --bs-floor={ENDS}
        --distill-after-cycles={DISTILL_FROM} --fitness-tokens={FITNESS} --pgt-steps=1000 --resume=a_name
        --input_bin={data}/text_train.pt --input_val_bin={data}/text_val.pt --checkpoint-base={out}
        --k-sweep""".split()


def our_arguments(s, data, out):
    return f"""configs/tiny.py --n_layer={LAYERS} --n_head={HEADS} --n_embd={WIDTH} --mtp_weight={MTP}
        --seed={SEED} --dropout={s['dropout']} --loop_start={LOOP[0]} --loop_end={LOOP[1]} --loop_extra=4
        --trajectories={s['N']} --cycles={s['C']} --micro_batch={s['B']} --epoch_multiple={s['B'] * s['G']}
        --epochs_per_cycle={TAU} --lr_scale={LR} --batch_tokens={PEAK} --batch_tokens_ends={ENDS}
        --distill_from={DISTILL_FROM} --fitness_tokens={FITNESS} --val_tokens={VALIDATION} --data=text
        --train_tokens={TOKENS} --sequence_len={T} --data_dir={data} --run_dir={out}/run""".split()


def run(s, path, **spec):
    """Workers under torchrun, one a rank. Their records; exits where one fails, with its last lines."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(spec, G=s["G"]), default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
               f"--nproc_per_node={s['N'] * s['G']}", "-m", "tests.end_to_end", "--worker", str(path)]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        fail(f"{path.parent.name}: exit code {done.returncode}: {done.stderr[-4000:]}", FAILED)
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(s["N"] * s["G"])]


def population(s, records):
    """Of every trajectory a dict of lists: its first rank's, but losses, sequences, moments of all."""
    found = []
    for t in range(s["N"]):
        of = [ranks[t * s["G"]:(t + 1) * s["G"]] for ranks in records]              # script after script
        every = {key: [x for ranks in of for x in zip(*(rank[key] for rank in ranks))] for key in of[0][0]}
        own = {key: [x for x, *_ in every[key]] for key in every}
        own |= {key: [cycle[key] for cycle in own["cycles"]] for key in own["cycles"][0]}
        own["losses"] = [sum(x) / s["G"] for x in every["losses"]]
        own["sequences"] = [sorted(sum(x, [])) for x in every["sequences"]]
        own["moments"] = [{k: w for cycle in x for k, w in cycle["moments"].items()} for x in every["cycles"]]
        found.append(own)
    return found


def run_ours(s, data, out, file="", edits=None):
    """From the first weights in data/0. A single rank runs both scripts in one process: that is quicker."""
    calls = [["train", "distill"]] if s["N"] * s["G"] == 1 else [["train"], ["distill"]]
    spec = dict(argv=our_arguments(s, data, out), first=data / "0", file=file, edits=edits)
    return population(s, [run(s, out / scripts[0], scripts=scripts, **spec) for scripts in calls])


def difference(a, b):
    """The relative one of numbers or dicts of tensors, the largest in lists; else infinite if they differ."""
    if isinstance(a, list | tuple):
        return max(map(difference, a, b), default=0.0) if len(a) == len(b) else math.inf
    if isinstance(a, float):
        return abs(a / b - 1)
    if not isinstance(a, dict):
        return 0.0 if a == b else math.inf
    if {name: w.numel() for name, w in a.items()} != {name: w.numel() for name, w in b.items()}:
        return math.inf
    up = sum((w.flatten() - b[name].flatten()).square().sum() for name, w in a.items())
    return float(up / sum(w.square().sum() for w in a.values())) ** 0.5 if a else 0.0


QUANTITIES = {          # a list in population(): what a reader sees
    "sequences": "sequences of every step", "rates": "multipliers of rate and decay, every step",
    "losses": "loss of every step", "norms": "gradient norm of every step",
    "weights": "weights at every cycle's end", "moments": "moments at every cycle's end",
    "noise": "noise before every cycle but the first", "teacher": "teacher of every distilled cycle",
    "fitness": "fitness loss of every member", "validation": "validation loss of every member"}


def compare(one, other):
    """quantity -> the largest difference over trajectories, steps, cycles."""
    return {key: difference([t[key] for t in one], [t[key] for t in other]) for key in QUANTITIES}


def scenario(name, public, work):
    """(their population; how ours differs from it; how theirs does, its first weights an ulp off)."""
    s, folder = SCENARIOS[name], work / name.split()[0]
    folder.mkdir()
    write_data(folder)
    def run_theirs(ulps):
        out = folder / str(ulps)
        spec = dict(public=public, argv=their_arguments(s, folder, out), first=out, off=ulps * ULP)
        return population(s, [run(s, out / "theirs", **spec)])
    with ThreadPoolExecutor(2) as pool:
        one, again = pool.map(run_theirs, (0, 1))
    return one, compare(one, run_ours(s, folder, folder / "ours")), compare(one, again)


def print_equal(public, work):
    """The table of what was compared. Returns what is out."""
    found, wrong = [], []
    for name in ("one rank", "two ranks"):
        s, (one, *differences) = SCENARIOS[name], scenario(name, public, work)
        print(f"- {name} a trajectory: {s['N']} x {s['C']} members, {len(one[0]['losses'])} steps, "
              f"dropout {s['dropout']}", flush=True)
        found += differences
        wrong += [f"{name}: {QUANTITIES[key]}" for key, x in differences[0].items() if not x <= LIMIT]
    print("\n| largest relative difference | one rank | an ulp | two ranks | an ulp |\n|---|---|---|---|---|")
    for key, what in QUANTITIES.items():
        print(f"| {what} | {' | '.join(f'{x[key]:.1e}' if x[key] else 'none' for x in found)} |")
    return wrong


def print_mutants(public, work):
    """The table of what changes did. Returns what does not show."""
    s, folder = SCENARIOS["mutants"], work / "mutants"
    one, intact, _ = scenario("mutants", public, work)

    def row(mutant):
        what, file, edits = mutant
        with tempfile.TemporaryDirectory(dir=folder) as out:
            [other] = run_ours(s, folder, Path(out), file, edits)
        off = [*map(difference, one[0]["losses"], other["losses"])]
        first = next((i for i, x in enumerate(off) if x > LIMIT), 0)
        weights = difference(one[0]["weights"][-1], other["weights"][-1])
        print(f"| {what} | {first + 1} | {off[first]:.1e} | {max(off):.1e} | {weights:.1e} |", flush=True)
        return [] if max(off) > LIMIT else [f"not seen: {what}"]

    print(f"\n| one thing of ours changed (nothing: {max(intact.values()):.1e}) | first loss off, step | by "
          "| largest | last weights |\n|---|---|---|---|---|")
    with ThreadPoolExecutor(2) as pool:
        unseen = sum(pool.map(row, MUTANTS), [])
    return unseen + [f"with nothing changed: {key}" for key, x in intact.items() if not x <= LIMIT]


@script
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return worker(argv[1])
    paths = [a for a in argv if a != "--mutants"]
    if len(paths) != 1 or paths[0].startswith("-"):
        fail("give the folder of a clone of github.com/qlabs-eng/slowrun, and --mutants or not")
    file = Path(paths[0]).resolve() / "unlimited" / "train.py"
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        fail(f"'{file}' is {'of another version' if file.exists() else 'missing'}: git clone "
             f"https://github.com/qlabs-eng/slowrun, git checkout {COMMIT} in it, and give its folder")
    for _, mutated, edits in MUTANTS:
        changed(ROOT / mutated, edits)
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, theirs at {COMMIT}\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        wrong = print_equal(file.parent, Path(work))
        wrong += print_mutants(file.parent, Path(work)) if "--mutants" in argv else []
    print("\nOUT: " + "; ".join(wrong) if wrong else "\nAll of it holds.")
    raise SystemExit(FAILED if wrong else 0)


if __name__ == "__main__":
    main()
