"""
Primitive 2, chain distillation (paper, section 3.2): from cycle distill_from on, every member learns from the
labels and from its frozen predecessor, its teacher.

One process:  python distill.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 distill.py configs/1p8b.py
One student:  the same and --student, after prior.py: one model learns from the learned prior's K members
Goes on from where train.py stopped, with the same loop and files; the student is a population of one, in
run_dir/student, which prior.py --student reports. Run again, it does what is missing.
"""
import math

import torch
import torch.nn.functional as F

from data import loader
from infra.config import from_args, student_of
from infra.console import fail, next_command, print0, script
from infra.files import read_json
from infra.run_directory import RunDirectory, load_prior, prior_answer
from model import GPT, cross_entropy
from train import run_cycles


# ----------------------------------------------------------------------------------------------- the loss

def distillation_kl(student_logits, teacher_logits, temperature):
    """T^2 * KL(teacher || student) of (n, V) logits, both softened by T, in nats, summed over positions."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def mixed_logits(teachers, states):
    """
    Logits (n, V) whose softmax is the weighted mean of the teachers', [(frozen model, weight)], from their
    hidden states at n positions, (n, C) each. One by one: of K teachers' logits two are alive at a time.
    """
    mix = None
    for (teacher, weight), x in zip(teachers, states):
        z = teacher.logits(x)
        if len(teachers) > 1:
            z = F.log_softmax(z, dim=-1) + math.log(weight)
        mix = z if mix is None else torch.logaddexp(mix, z)
    return mix


def distilled_loss(student, teachers, batch, alpha, temperature):
    """
    (1 - alpha) * (cross-entropy + weighted multi-token prediction) + alpha * KL (paper, eq. 6) to the
    weighted mean of the teachers, [(frozen model, weight)], of sequences (B, T + 1), in nats per token.
    """
    with torch.no_grad():                       # N, C each: logits follow chunk by chunk, as the student's do
        states = [teacher.hidden(batch[:, :-1]).flatten(0, 1) for teacher, _ in teachers]

    def token_loss(logits, targets, *states):
        with torch.no_grad():
            teacher_logits = mixed_logits(teachers, states)
        kl = distillation_kl(logits, teacher_logits, temperature)
        return (1 - alpha) * cross_entropy(logits, targets) + alpha * kl

    loss, mtp = student(batch[:, :-1], batch[:, 1:], token_loss, *states)
    return loss + (1 - alpha) * mtp


# ---------------------------------------------------------------------------------------------- the chain

def frozen_model(config, device):
    """A model for members' weights, to be asked and not trained."""
    model = GPT(config).to_device(device, config.compile).eval().requires_grad_(False)      # eval: no dropout
    return model.bfloat16() if device.type == "cuda" else model     # the members' own type


def teacher_of(run, t, cycle):
    """The cycle of trajectory t whose member teaches this cycle: the previous one."""
    return cycle - 1


class ChainLoss:
    """The loss function of each cycle. One teacher stays in memory, with other weights in every cycle."""

    def __init__(self):
        self.teacher = None

    def __call__(self, run, t, cycle, device):
        c, chosen = run.config, teacher_of(run, t, cycle)
        assert 0 <= chosen < cycle, f"cycle {chosen} cannot teach cycle {cycle}"
        self.teacher = self.teacher or frozen_model(c, device)
        self.teacher.load_state_dict(run.load_member(t, chosen)[0])
        return lambda student, batch: distilled_loss(
            student, [(self.teacher, 1.0)], batch, c.distill_alpha, c.distill_temperature)


# --------------------------------------------------------------------------------------------- one student

def choose_teachers(config, student_config):
    """K members to teach a student, and first, whose weights it starts from; once begun, it keeps its own."""
    path, K = RunDirectory(student_config, data_fingerprint=None).config_path, config.student_teachers
    if not path.exists():
        prior = load_prior(config.run_dir)
        # its answers for K and for 1: [trajectory, cycle, SHA-256 of the weights, weight in the mixture]
        teachers, [first] = ([[m["trajectory"], m["cycle"], m["weights_sha256"], w]
                              for m, w in prior_answer(prior, k, option="student_teachers")] for k in (K, 1))
        return dict(K=K, teachers=teachers, first=first)
    chosen = read_json(path)["taught_by"]
    if chosen["K"] != K:
        fail(f"run_dir='{student_config.run_dir}' has a student of student_teachers={chosen['K']}, not {K}: "
             "move it away to train another")
    return chosen


def teach_student(config, argv):
    """A population of one, on from the best member's weights, taught by the mixture of K members."""
    population, own = RunDirectory(config, loader.load(config).fingerprint), student_of(config)
    chosen = choose_teachers(config, own)

    def weights_of(t, c, sha256, _):
        weights, about = population.load_member(t, c)
        if about["tensors_sha256"] != sha256:
            fail(f"'{population.member_path(t, c)}' is not the member that prior.json weighed: run prior.py "
                 f"again, and move '{own.run_dir}' away if it is there")
        return weights

    def student_loss(run, t, cycle, device):
        teachers = [(frozen_model(own, device), weight) for *_, weight in chosen["teachers"]]
        for (model, _), member in zip(teachers, chosen["teachers"]):
            model.load_state_dict(weights_of(*member))
        return lambda student, batch: distilled_loss(
            student, teachers, batch, own.distill_alpha, own.distill_temperature)

    run_cycles(own, range(1), student_loss, next_command("distill.py", argv), weights_of(*chosen["first"]),
               taught_by=chosen)


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, student=False)
    if options.student:
        teach_student(config, argv)
    elif config.distill_from < config.cycles:
        cycles = range(config.distill_from, config.cycles)
        run_cycles(config, cycles, ChainLoss(), next_command("distill.py", argv))
    else:
        print0(f"no chain: distill_from={config.distill_from} is not below cycles={config.cycles}")
    print0(f"next: {next_command('prior.py', argv)}")


if __name__ == "__main__":
    main()
