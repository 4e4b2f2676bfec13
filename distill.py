"""
Primitive 2, chain distillation (paper, section 3.2): from cycle distill_from on, every member learns from labels and from
its frozen predecessor, the member that the same trajectory wrote one cycle before.

One process:  python distill.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 distill.py configs/1p8b.py

Goes on from where train.py stopped, with the same loop, and writes the same files. Run again, it does what is missing.
"""
import os

import torch
import torch.nn.functional as F

from config import from_args
from model import GPT, cross_entropy
from train import run_cycles
from world import next_command, one_line_errors


def distillation_kl(student_logits, teacher_logits, temperature):
    """T^2 * KL(teacher || student) of (n, V) logits, both softened by T, in nats, summed over positions."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def chain_loss(student, teacher, batch, alpha, temperature):
    """(1 - alpha) * training loss + alpha * T^2 KL, of sequences (B, T + 1), in nats per token (paper, eq. 6)."""
    idx, targets = batch[:, :-1], batch[:, 1:]
    with torch.no_grad():
        states = teacher.hidden(idx).flatten(0, 1)          # N, C: logits follow chunk by chunk, as the student's do

    def token_loss(logits, targets, chunk):
        with torch.no_grad():
            teacher_logits = teacher.logits(states[chunk])
        return (1 - alpha) * cross_entropy(logits, targets) + alpha * distillation_kl(logits, teacher_logits, temperature)

    loss, mtp = student(idx, targets, token_loss)
    return loss + (1 - alpha) * mtp


class Chain:
    """loss_for_cycle of the chain. One teacher stays in memory, its weights replaced before every cycle."""

    def __init__(self, config):
        self.config, self.teacher = config, None

    def __call__(self, run, device, t, cycle):
        c = self.config
        if self.teacher is None:
            self.teacher = GPT(c).place(device, c.compile).eval().requires_grad_(False)      # eval: no dropout
            if device.type == "cuda":
                self.teacher.bfloat16()         # the members' own type; the CPU computes in float32
        weights, _ = run.read_member(t, cycle - 1)      # the newest snapshot of this trajectory, before the noise
        self.teacher.load_state_dict(weights)
        return lambda student, batch: chain_loss(student, self.teacher, batch, c.distill_alpha, c.distill_temperature)


def main(argv=None):
    config = from_args(argv, __doc__)
    if config.distill_from >= config.cycles:
        if os.environ.get("RANK", "0") == "0":
            print(f"no chain: distill_from={config.distill_from} is not below cycles={config.cycles}\nnext: {next_command('prior.py', argv)}")
        return
    with one_line_errors(config):
        run_cycles(config, config.distill_from, config.cycles, Chain(config), argv, "distill.py", then="prior.py")


if __name__ == "__main__":
    main()
