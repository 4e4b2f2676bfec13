"""
What only a GPU can check: python -m tests.on_gpu [PART ...]
The model, the losses, the optimizer and two ranks in bf16 on CUDA, eager and compiled, against float32 on
the CPU; then the scripts, once whole, once stopped and gone on, with every teacher. A line for each; exits 1
where one is out. Takes five minutes.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch.nn.attention import current_flash_attention_impl

import distill
import train
from data import loader
from infra.console import ROOT, fail
from infra.files import read_json
from model import GPT, GPTConfig, attend
from optim import MuonAdamW

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SHAPE = dict(sequence_len=256, vocab_size=1000, n_layer=6, n_head=2, n_embd=256, loop_start=3, loop_end=5,
             loop_extra=2, dropout=0.0)
FAILED = []


def report(name, error, allowed):
    out = "" if error <= allowed else "   <-- OUT"
    print(f"{name}: {error:.2g}, allowed {allowed:g}{out}", flush=True)
    FAILED.extend([name] if out else [])


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


def weights_of(model):
    return {n: p.detach().float().cpu().clone() for n, p in model.named_parameters()}


def tokens(n):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPE["vocab_size"], (n, SHAPE["sequence_len"] + 1), generator=generator)


def attention():
    for T, D, window in ((512, 128, None), (512, 128, 256), (256, 64, 100), (96, 32, 200)):
        torch.manual_seed(0)
        inputs = [torch.randn(2, T, 4, D).bfloat16() for _ in range(4)]
        sides = []
        for device, dtype in ((CPU, torch.float32), (GPU, torch.bfloat16)):
            q, k, v, g = (x.to(device, dtype) for x in inputs)
            y = attend(*(z.requires_grad_() for z in (q, k, v)), window)
            sides.append([y, *torch.autograd.grad(y, (q, k, v), g)])
        report(f"attention, T={T}, D={D}, window {window}: output and gradients",
               max(map(relative, sides[1], sides[0])), 1e-2)


def gradients(model, teachers, batch):
    """(name, loss, parameter -> gradient) for labels, the chain's teacher, a student's two."""
    chain, student = [(teachers[0], 1.0)], list(zip(teachers, (0.7, 0.3)))
    for name, loss_fn, args in (("labels", train.label_loss, [batch]),
                                ("chain", distill.distilled_loss, [chain, batch, 0.45, 1.2]),
                                ("student", distill.distilled_loss, [student, batch, 0.85, 1.0])):
        model.zero_grad()
        loss = loss_fn(model.train(), *args)
        loss.backward()
        yield name, loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def built_with_teachers(device, compile=False):
    model, *teachers = (built(device, compile, seed) for seed in (0, 5, 6))
    return model, [teacher.eval().requires_grad_(False) for teacher in teachers]


def model_and_losses():
    """And between a micro-batch's arrival and its gradients nothing asks the GPU for a value."""
    batch, (reference, teachers) = tokens(3), built_with_teachers(CPU)
    wanted = list(gradients(reference, teachers, batch))
    for kind in ("eager", "compiled"):
        model, teachers = built_with_teachers(GPU, kind == "compiled")
        found = gradients(model, [teacher.bfloat16() for teacher in teachers], batch.to(GPU))
        for (name, loss, of), (_, value, theirs) in zip(found, wanted):
            report(f"{kind}, {name}: loss", abs(loss / value - 1), 2e-3)
            errors = {n: relative(of[n], theirs[n]) for n in of}
            worst = max(errors, key=errors.get)
            report(f"{kind}, {name}: gradients, median", median(errors.values()), 3e-2)
            # a mix's gradient is a small difference of large sums: 0.07 to 0.19 of it was rounding on an H200
            report(f"{kind}, {name}: gradient of {worst}, the worst", errors[worst], 0.3)
        ours, theirs = (torch.from_numpy(loader.score(m, batch.numpy(), 2)) for m in (model, reference))
        gap = ours - theirs
        report(f"{kind}: log p of every token, largest difference, nats", gap.abs().max().item(), 0.1)
        report(f"{kind}: mean log p, difference, nats", gap.mean().abs().item(), 2e-3)
        if kind == "eager":
            # 4,096 tokens: the embedding's backward pass has a way of its own for few
            rows = tokens(16).to(GPU)
            train.label_loss(model, rows).backward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                train.label_loss(model, rows).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            print("no synchronisation in forward and backward")


def steps(device, group, rank, size):
    """[name -> weight] before, after one and after two steps, with these their loss and gradient norm."""
    model = built(device, compile=bool(group)).train()
    optimizer, ddp_model = MuonAdamW(model.named_parameters(), 0.25, group), model
    if group:
        sizes = dict(batch_tokens=1024, batch_tokens_ends=1024, micro_batch=1)
        model.config = SimpleNamespace(**vars(model.config), **sizes)
        # said to be two, NCCL's one rank, too, goes through DDP
        ddp_model = train.distributed(model, SimpleNamespace(group=group, group_size=2))
    batches, states = tokens(32)[rank::size].to(device).split(16), [weights_of(model)]
    for _ in range(2):
        loss, norm = train.train_step(ddp_model, optimizer, batches, train.label_loss, (1.0, 1.0))
        states.append(dict(weights_of(model), loss=loss.cpu(), norm=norm.cpu()))
    optimizer.state_dict()
    return states


def rank_steps(rank, size, folder, backend):
    """`size` ranks on one GPU. NCCL wants a GPU for each, so two meet over gloo."""
    dist.init_process_group(backend, init_method=f"file://{folder}/{backend}", rank=rank, world_size=size,
                            device_id=torch.device("cuda", 0) if backend == "nccl" else None)
    states = steps(GPU, dist.group.WORLD, rank, size)
    if rank == 0:
        torch.save(states, Path(folder) / f"{backend}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ranks():
    """A step on the CPU and on one rank over NCCL; two on that one and on two ranks of one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        for size, backend in ((1, "nccl"), (2, "gloo")):
            multiprocessing.spawn(rank_steps, (size, folder, backend), nprocs=size)
        one, two = (torch.load(f"{folder}/{backend}.pt") for backend in ("nccl", "gloo"))
    cpu = steps(CPU, None, 0, 1)
    for name, allowed in (("loss", 2e-3), ("norm", 2e-2)):
        report(f"a step of one rank and of the CPU: {name}", relative(one[1][name], cpu[1][name]), allowed)
    matrices = [n for n in cpu[0] if re.fullmatch(r"transformer\.h.*\.c_\w+\.weight", n) and "gate" not in n]
    report("a step of one rank and of the CPU: what Muon adds, median over matrices",
           median(relative(one[1][n] - one[0][n], cpu[1][n] - cpu[0][n]) for n in matrices), 0.1)
    report("two ranks and one: norm of the second gradient", relative(two[2]["norm"], one[2]["norm"]), 1e-2)
    report("two ranks and one: weights after two steps, the worst",
           max(relative(two[2][n], one[2][n]) for n in cpu[0] if "_mix" not in n), 2e-2)


def population(folder, argv):
    """
    Trained by the three scripts in this folder; "stopped" is asked to stop in the first cycle and started
    again, "compiled" has a student. The last member's weights, and the loss of the mean of all.
    """
    argv, log = [*argv, f"--run_dir={folder}"], folder / "metrics.jsonl"
    if folder.name == "stopped":
        child = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        while child.poll() is None and not (log.exists() and log.read_text().count('"step"') > 9):
            time.sleep(0.01)
        child.terminate()
        print(f"stopped: train.py ended with exit code {child.wait()}", flush=True)
    student = ["distill.py --student", "prior.py --student"] if folder.name == "compiled" else []
    for step in ("train.py", "distill.py", "prior.py", *student, "tools/generate.py --tokens=40"):
        began, (name, *flags) = time.perf_counter(), step.split()
        done = subprocess.run([sys.executable, name, *argv, *flags], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        last = re.split(r"[\r\n]", done.stderr.strip())[-1]
        print(f"{folder.name}: {step} {time.perf_counter() - began:.0f} s  {last[-90:]}", flush=True)
        assert done.returncode == 0, f"{done.returncode}: {done.stdout[-600:]} {done.stderr[-1200:]}"
    loss = read_json(folder / "prior.json")["losses"]["uniform"]["val"][-1]
    print(f"{folder.name}: {loss:.4f}, {done.stdout.strip()}", flush=True)
    return load_file(max(folder.glob("trajectory_*/cycle_*.safetensors"))), loss


def scripts():
    """The demo's model on four cycles, side by side: eager, again, stopped, and compiled with a student."""
    runs = dict(eager=[], again=[], stopped=[], compiled=["--compile=True"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        base = [str(ROOT / "configs" / "tiny.py"), f"--data_dir={folder}/data", "--cycles=4",
                "--trajectories=1", "--distill_from=2"]
        command = [sys.executable, "-m", "data.prepare", *base]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for name, more in runs.items():
            runs[name] = pool.submit(population, Path(folder) / name, [*base, *more])
        weights, losses = ({name: run.result()[i] for name, run in runs.items()} for i in (0, 1))
    for other, allowed in dict(again=0.02, stopped=0.02, compiled=0.1).items():
        loss = abs(losses[other] - losses["eager"])
        report(f"eager and {other}: loss of the mean of all members", loss, allowed)
        worst = max(relative(weights[other][n], w) for n, w in weights["eager"].items())
        print(f"eager and {other}: the last member's weights differ by {worst:.2g} (CUDA promises no bits)")


PARTS = {part.__name__: part for part in (
    attention, model_and_losses, ranks, scripts)}


def main():
    if not torch.cuda.is_available():
        fail("tests.on_gpu wants a GPU; the other tests are the CPU's")
    if not PARTS.keys() >= set(sys.argv[1:]):
        fail(f"tests.on_gpu has the parts {', '.join(PARTS)}, not {' '.join(sys.argv[1:])}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"{current_flash_attention_impl() or 'FA2'}, Python {sys.version.split()[0]}")
    for name in sys.argv[1:] or PARTS:
        began = time.perf_counter()
        try:
            PARTS[name]()
        except Exception as e:              # a failure, and the other parts go on
            print(f"{name}: {type(e).__name__}: {str(e)[:1500]}   <-- OUT")
            FAILED.append(name)
        print(f"    {time.perf_counter() - began:.1f} s", flush=True)
    print(f"out: {FAILED or 'nothing'}")
    raise SystemExit(bool(FAILED))


if __name__ == "__main__":
    main()
