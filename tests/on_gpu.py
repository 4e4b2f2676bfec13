"""
What only a GPU can check: python -m tests.on_gpu [PART ...]
The model, the losses, the optimizer and two ranks in bf16 on CUDA, eager and compiled, against float32 on the CPU; then the
scripts, once whole, once stopped and gone on, with every teacher. A line for each; exits 1 where one is out.
Takes five minutes.
"""
import functools
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.attention import current_flash_attention_impl

import distill
import train
from data import loader
from infra.console import fail
from infra.files import read_json
from model import GPT, GPTConfig, attend
from optim import MuonAdamW

ROOT = Path(__file__).resolve().parent.parent
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = dict(sequence_len=256, vocab_size=1000, n_layer=6, n_head=2, n_embd=256, loop_start=3, loop_end=5, loop_extra=2,
             dropout=0.0)
FAILED = []


def report(name, error, allowed):
    print(f"{name}: {error:.2g}, allowed {allowed:g}{'' if error <= allowed else '   <-- OUT'}", flush=True)
    FAILED.extend([name] * (not error <= allowed))


def check(function):
    """A part of the run; what it raises is a failure, and the others go on."""
    @functools.wraps(function)
    def tried(*args):
        began = time.perf_counter()
        try:
            function(*args)
        except Exception as e:
            print(f"{function.__name__}: {type(e).__name__}: {str(e)[:1500]}   <-- OUT", flush=True)
            FAILED.append(function.__name__)
        print(f"    {time.perf_counter() - began:.1f} s", flush=True)
    return tried


def relative(a, b):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def built(device, compile=False, seed=0):
    """A model whose every part counts: no weight is left at zero."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE)).init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model.to_device(device, compile)


def tokens(n, seed=1):
    return torch.randint(SHAPE["vocab_size"], (n, SHAPE["sequence_len"] + 1), generator=torch.Generator().manual_seed(seed))


@check
def attention():
    for T, D, window in ((512, 128, None), (512, 128, 256), (256, 64, 100), (96, 32, 200)):
        torch.manual_seed(0)
        inputs = [torch.randn(2, T, 4, D).bfloat16() for _ in range(4)]
        sides = []
        for device, dtype in ((CPU, torch.float32), (GPU, torch.bfloat16)):
            q, k, v, g = (x.to(device, dtype) for x in inputs)
            y = attend(*(z.requires_grad_() for z in (q, k, v)), window)
            sides.append([y, *torch.autograd.grad(y, (q, k, v), g)])
        report(f"attention, T={T}, D={D}, window {window}: output and gradients", max(map(relative, sides[1], sides[0])), 1e-2)


def losses(teacher, other):
    """name -> loss function of a model: labels, the chain's teacher, a student's two."""
    return dict(labels=train.label_loss,
                chain=lambda model, rows: distill.distilled_loss(model, [(teacher, 1.0)], rows, 0.45, 1.2),
                student=lambda model, rows: distill.distilled_loss(model, [(teacher, 0.7), (other, 0.3)], rows, 0.85, 1.0))


@check
def model_and_losses():
    batch = tokens(3)
    reference, *teachers = built(CPU), *(built(CPU, seed=n).eval().requires_grad_(False) for n in (5, 6))
    wanted = {}
    for name, loss_fn in losses(*teachers).items():
        reference.zero_grad()
        loss = loss_fn(reference.train(), batch)
        loss.backward()
        wanted[name] = loss.item(), {n: p.grad.clone() for n, p in reference.named_parameters()}
    for kind in ("eager", "compiled"):
        model = built(GPU, kind != "eager")
        teachers = [built(GPU, kind != "eager", seed=n).eval().requires_grad_(False).bfloat16() for n in (5, 6)]
        for name, loss_fn in losses(*teachers).items():
            model.zero_grad()
            loss = loss_fn(model.train(), batch.to(GPU))
            loss.backward()
            value, gradients = wanted[name]
            report(f"{kind}, {name}: loss", abs(loss.item() / value - 1), 2e-3)
            worst = {n: relative(p.grad, gradients[n]) for n, p in model.named_parameters()}
            n = max(worst, key=worst.get)
            report(f"{kind}, {name}: gradients, median", sorted(worst.values())[len(worst) // 2], 3e-2)
            # a mix's gradient is a small difference of large sums: 0.07 to 0.19 of it was rounding on an H200
            report(f"{kind}, {name}: gradient of {n}, the worst", worst[n], 0.3)
        rows = batch.numpy()
        ours, theirs = (torch.from_numpy(loader.score(m, rows, 2)) for m in (model, reference))
        report(f"{kind}: log p of every token, largest difference, nats", (ours - theirs).abs().max().item(), 0.1)
        report(f"{kind}: mean log p, difference, nats", (ours - theirs).mean().abs().item(), 2e-3)


@check
def the_step_does_not_wait():
    """
    Between a micro-batch's arrival and its gradients nothing asks the GPU for a value; weights after a step are those of
    the CPU.
    """
    # 4,096 tokens a micro-batch: the embedding's backward pass has a way of its own for few
    batch, sides = tokens(32), []
    for device in (CPU, GPU):
        model = built(device).train()
        optimizer = MuonAdamW(model.named_parameters(), 0.25)
        batches = [(rows,) for rows in batch.to(device).split(16)]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if device == GPU:
            train.label_loss(model, *batches[0]).backward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                train.label_loss(model, *batches[0]).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            print("no synchronisation in forward and backward")
        loss, norm = train.train_step(model, optimizer, batches, train.label_loss, (1.0, 1.0))
        sides.append((loss, norm, {n: p.detach().float().cpu() - before[n].float().cpu() for n, p in model.named_parameters()}))
    report("a step: loss", relative(sides[1][0], sides[0][0]), 2e-3)
    report("a step: gradient norm", relative(sides[1][1], sides[0][1]), 2e-2)
    muon = {n: relative(sides[1][2][n], d) for n, d in sides[0][2].items()
            if d.ndim == 2 and n.startswith("transformer.h.") and "_mix" not in n and "gate.w" not in n}
    report("a step: what Muon adds, median over matrices", sorted(muon.values())[len(muon) // 2], 0.1)


def rank_step(rank, size, folder, backend):
    """A step of `size` ranks on one GPU; the weights go to folder/size.pt. NCCL wants a GPU each, so two meet over gloo."""
    dist.init_process_group(backend, init_method=f"file://{folder}/{backend}", rank=rank, world_size=size,
                            **(dict(device_id=torch.device("cuda", 0)) if backend == "nccl" else {}))
    group, _ = dist.new_subgroups_by_enumeration([list(range(size))])
    model = built(GPU, compile=True).train()
    optimizer = MuonAdamW(model.named_parameters(), 0.25, group)
    one = dist.get_world_size
    train.dist.get_world_size = lambda g: max(2, one(g))            # NCCL's one rank, too, goes through DDP
    ddp_model = train.distributed(model, group, 1)
    train.dist.get_world_size = one
    model.zero_grad(set_to_none=False)
    for _ in range(2):
        _, norm = train.train_step(ddp_model, optimizer, tokens(4).to(GPU)[rank::size].split(1),
                                   train.label_loss, (1.0, 1.0))
    optimizer.state_dict()
    if rank == 0:
        torch.save(dict(norm=norm.cpu(), **{n: p.detach().cpu() for n, p in model.named_parameters()}),
                   Path(folder) / f"{size}{backend}.pt")
    dist.barrier()
    dist.destroy_process_group()


@check
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        for size, backend in ((1, "nccl"), (2, "gloo")):
            multiprocessing.spawn(rank_step, (size, folder, backend), nprocs=size)
        one, two = (torch.load(Path(folder) / f"{name}.pt") for name in ("1nccl", "2gloo"))
    report("two ranks on this GPU (gloo) and one (NCCL): gradient norm of the second step",
           relative(two.pop("norm"), one.pop("norm")), 1e-2)
    report("two ranks and one: weights after two steps, the worst",
           max(relative(two[n], one[n]) for n in one if "_mix" not in n), 2e-2)


def script(name, argv):
    done = subprocess.run([sys.executable, name, *argv], cwd=ROOT, capture_output=True, text=True)
    last = re.split(r"[\r\n]", done.stderr.strip() or "-")[-1]
    assert done.returncode == 0, f"{name} {argv}: exit code {done.returncode}: {done.stdout[-600:]} {done.stderr[-1200:]}"
    return done, last


def population(folder, name, argv):
    """
    Trained by the three scripts, where it is the stopped one, asked to stop in the first cycle and started again. The last
    member's weights, and the loss of the mean of all.
    """
    argv = [*argv, f"--run_dir={folder / name}"]
    say = lambda *words: print(f"{name}:", *words, flush=True)
    if name == "stopped":
        child, log = (subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
                      folder / name / "metrics.jsonl")
        while child.poll() is None and not (log.exists() and log.read_text().count('"step"') > 9):
            time.sleep(0.01)
        child.terminate()
        say(f"train.py asked to stop: exit code {child.wait()} after {log.read_text().count(chr(10))} steps")
    for step in ("train.py", "distill.py", "prior.py") + ("distill.py --student", "prior.py --student") * (name == "student"):
        began = time.perf_counter()
        _, last = script(step.split()[0], [*argv, *step.split()[1:]])
        say(f"{step} {time.perf_counter() - began:.0f} s  {last[-90:]}")
    answers = {f"{a['rule']} of {a['K']}": round(a["val_loss"], 4)
               for a in read_json(folder / name / "prior.json")["answers"] if a["rule"] != "topk"}
    say(answers)
    say(script("-m", ["tools.generate", *argv, "--tokens=40"])[0].stdout.strip())
    return read(max((folder / name).glob("trajectory_*/cycle_*.safetensors")))[0], answers["uniform of 4"]


@check
def scripts():
    """
    The demo's model on four cycles, side by side: twice the same eager, one of them stopped, compiled, and compiled with a
    student.
    """
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))


def compare(folder):
    base = [str(ROOT / "configs" / "tiny.py"), f"--data_dir={folder / 'data'}",
            "--cycles=4", "--trajectories=1", "--distill_from=2"]
    subprocess.run([sys.executable, "-m", "data.prepare", *base], cwd=ROOT, check=True, capture_output=True)
    kinds = dict(eager=[], again=[], stopped=[], compiled=["--compile=True"],
                 student=["--compile=True"])
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(population, folder, name, [*base, *more]) for name, more in kinds.items()}
    weights, losses = ({name: run.result()[i] for name, run in runs.items()} for i in (0, 1))
    for other, allowed in dict(again=0.02, stopped=0.02, compiled=0.1).items():
        report(f"eager and {other}: loss of the mean of all members", abs(losses[other] - losses["eager"]), allowed)
        print(f"eager and {other}: the last member's weights differ by "
              f"{max(relative(weights[other][n], w) for n, w in weights['eager'].items()):.2g} (no bits are promised on CUDA)")


PARTS = {part.__name__: part for part in (attention, model_and_losses, the_step_does_not_wait, ranks, scripts)}


def main():
    if not torch.cuda.is_available():
        fail("tests.on_gpu wants a GPU; the other tests are the CPU's")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {current_flash_attention_impl() or 'FA2'}, "
          f"Python {sys.version.split()[0]}")
    if not PARTS.keys() >= set(sys.argv[1:]):
        fail(f"tests.on_gpu has the parts {', '.join(PARTS)}, not {' '.join(sys.argv[1:])}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
    print(f"out: {FAILED or 'nothing'}")
    raise SystemExit(bool(FAILED))


if __name__ == "__main__":
    main()
