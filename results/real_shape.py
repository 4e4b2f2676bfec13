"""
The real shape, on a CPU: python results/real_shape.py [FOLDER]       (half an hour on two cores, 20 GB of memory, 4 GB of disk)
The model of configs/1p8b.py in bf16 throughout, at a short sequence: one step of train.py, its member written, read and
scored, noise, and one step of distill.py against that member. Prints what it took; writes results/real_shape.md.
"""
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import optim                                                                # noqa: E402
from config import from_args                                                # noqa: E402
from distill import OneMember, predecessor                                  # noqa: E402
from model import GPT                                                       # noqa: E402
from optim import MuonAdamW                                                 # noqa: E402
from population import Run                                                  # noqa: E402
from results.demo import commit                                             # noqa: E402
from train import apply_gradients, label_loss, noise_scale, noise_seed, perturb, rate_multipliers      # noqa: E402

TOKENS, CPU = 64, torch.device("cpu")
lines = []


def say(line):
    print(line, flush=True)
    lines.append(line)


def timed(what, function):
    """The function's value; a row of the table with its seconds and the peak of memory so far."""
    began = time.perf_counter()
    value = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    say(f"| {what} | {time.perf_counter() - began:,.0f} | {peak:.1f} | "
        f"{f'{float(value):.4f}' if isinstance(value, (float, torch.Tensor)) else ''} |")
    return value


def step(model, optimizer, batch, loss_fn, name):
    """One optimizer step, forward and backward and update timed apart; the loss before it."""
    model.zero_grad(set_to_none=False)
    loss = timed(f"{name}: forward and loss", lambda: loss_fn(model, batch, None))
    timed(f"{name}: backward", loss.backward)
    timed(f"{name}: clip and optimizer step; gradient norm",
          lambda: apply_gradients(model, optimizer, *rate_multipliers("cycle", 0, 508)).item())
    wrong = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    assert not wrong, f"not finite after the step: {wrong}"


def evaluate(model, batch):
    with torch.no_grad():
        return -model.eval().log_p(batch[:, :-1], batch[:, 1:]).mean().item()


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    config = from_args([str(ROOT / "configs" / "1p8b.py"), f"--sequence_len={TOKENS}", f"--batch_tokens={TOKENS}",
                        f"--batch_tokens_ends={TOKENS}", "--micro_batch=1", f"--run_dir={folder}"], "")
    run = Run(config, data_fingerprint=None)
    torch.manual_seed(42)
    optim.STACK = 1 << 25                                       # 128 MiB at once: 8 matrices of 2048 x 2048
    torch.set_default_dtype(torch.bfloat16)                     # weights, gradients, optimizer state: fp32 does not fit
    say(f"# The real shape, on a CPU\n\nPrinted by `python results/real_shape.py` at commit {commit()}: "
        f"{config.n_layer} layers x {config.n_embd}, vocabulary {config.vocab_size}, "
        f"bf16 throughout, one sequence of {TOKENS} random tokens;\n"
        f"torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads.\n")
    say("| | seconds | peak memory so far, GiB | value |\n|---|---|---|---|")
    model = timed("build and initialise", lambda: GPT(config).init_weights().train())
    optimizer = MuonAdamW(model.named_parameters(), config.lr_scale)
    batch = torch.randint(config.vocab_size, (1, TOKENS + 1))
    step(model, optimizer, batch, label_loss, "train step")
    after = timed("the batch's loss after it (no dropout, no MTP)", lambda: evaluate(model, batch))
    timed("write the member", lambda: run.save_member(0, 0, model.state_dict(), epochs=0, fit_loss=after))
    size = run.member_path(0, 0).stat().st_size
    chain = OneMember(config, predecessor)
    teach = timed("read it back as the teacher", lambda: chain(
        SimpleNamespace(run=run, world=SimpleNamespace(device=CPU)), SimpleNamespace(t=0, cycles_done=1)))
    same = evaluate(chain.teacher, batch)
    timed("noise before cycle 1", lambda: perturb(model, noise_scale(1, config.cycles), noise_seed(config.seed, 1)))
    timed("the batch's loss after it", lambda: evaluate(model, batch))
    step(model.train(), optimizer, batch, teach, "distilled step")
    timed("the batch's loss after it", lambda: evaluate(model, batch))
    say(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.layers)} layer applications; "
        f"the member takes {size:,} bytes. The teacher's loss is {same:.6f}, its student's before the noise {after:.6f}: "
        f"{'equal' if same == after else 'DIFFERENT'}.")
    (ROOT / "results" / "real_shape.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
