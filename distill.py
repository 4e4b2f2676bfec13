"""
Primitive 2, distillation (paper, section 3.2): from cycle distill_from on, every member learns from labels and from a
frozen teacher: by distill_teacher its predecessor (the paper's chain), its trajectory's best member so far or mixture of all.

One process:  python distill.py configs/tiny.py [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 distill.py configs/1p8b.py
One student:  the same and --student, after prior.py: one model learns from the mixture of all members

Goes on from where train.py stopped, with the same loop, and writes the same files; the student, made in run_dir/student,
is kept as run_dir/student.pt, and reported when prior.py is run again. Run again, it does what is missing.
"""
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from config import from_args, take_actions
from data import loader
from errors import first_rank, refuse, speak
from files import sha256_of, sweep
from model import GPT, chunks, cross_entropy
from population import STORED, STUDENT, Run, read_prior, whole_mixture
from train import run_cycles
from world import StopSignals, next_command, one_line_errors, say_next


# ----------------------------------------------------------------------------------------------- the loss

def distillation_kl(student_logits, teacher_logits, temperature):
    """T^2 * KL(teacher || student) of (n, V) logits, both softened by T, in nats, summed over positions."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def stored_kl(student_logits, p, ids):
    """
    KL(teacher || student) of (n, V) logits in nats, summed over positions, where p (n, k) are the teacher's largest
    probabilities, of the tokens ids (n, k), and all other tokens are merged into one: up to rounding a lower bound of the
    KL over all.
    """
    student = F.log_softmax(student_logits, dim=-1)
    others = student.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([student.gather(-1, ids), others], dim=-1)                  # n, k + 1
    p = torch.cat([p, (1 - p.sum(dim=-1, keepdim=True)).clamp(min=0)], dim=-1)
    return (torch.xlogy(p, p) - p * student).sum()


def distilled_loss(student, batch, alpha, kl, *teaching):
    """
    (1 - alpha) * (cross-entropy + weighted multi-token prediction) + alpha * KL of sequences (B, T + 1), in nats per token.
    kl(logits (n, V), *rows) is the sum over n tokens; rows are their part of `teaching`, tensors of B * T rows.
    """
    def token_loss(logits, targets, *teaching):
        return (1 - alpha) * cross_entropy(logits, targets) + alpha * kl(logits, *teaching)

    loss, mtp = student(batch[:, :-1], batch[:, 1:], token_loss, *teaching)
    return loss + (1 - alpha) * mtp


def chain_loss(student, teacher, batch, alpha, temperature):
    """The distilled loss from one frozen model, whichever it is (paper, eq. 6)."""
    with torch.no_grad():
        states = teacher.hidden(batch[:, :-1]).flatten(0, 1)        # N, C: logits follow chunk by chunk, as the student's do

    def kl(logits, states):
        with torch.no_grad():
            teacher_logits = teacher.logits(states)
        return distillation_kl(logits, teacher_logits, temperature)

    return distilled_loss(student, batch, alpha, kl, states)


# --------------------------------------------------------------------------------------- one member teaches

def frozen(config, device):
    """A model for members' weights."""
    model = GPT(config).place(device, config.compile).eval().requires_grad_(False)      # eval: no dropout
    return model.bfloat16() if device.type == "cuda" else model             # the members' own type; the CPU computes in float32


def predecessor(run, t, cycle):
    """The cycle whose member teaches: the last one."""
    return cycle - 1


def best(run, t, cycle):
    """The one of lowest loss on the fitness set."""
    return min(range(cycle), key=lambda c: run.read_member(t, c, check=False)[1]["fit_loss"])


class OneMember:
    """loss_for_cycle where one member teaches. One teacher stays in memory, its weights replaced before every cycle."""

    def __init__(self, config, choose):
        self.config, self.choose, self.teacher = config, choose, None

    def weights(self, run, t, cycle):
        """The state dict of who teaches this cycle."""
        chosen = self.choose(run, t, cycle)
        assert 0 <= chosen < cycle, f"cycle {chosen} cannot teach cycle {cycle}"
        return run.read_member(t, chosen)[0]

    def __call__(self, launch, trajectory):
        c = self.config
        self.teacher = self.teacher or frozen(c, launch.world.device)
        self.teacher.load_state_dict(self.weights(launch.run, trajectory.t, trajectory.cycles_done))
        return lambda student, batch, numbers: chain_loss(student, self.teacher, batch, c.distill_alpha, c.distill_temperature)


# ------------------------------------------------------------------------------------------ a mixture teaches

PART = 4096                 # sequences of a packing that are stored in one file, and worked on by one rank


def newest_share(old, new):
    """
    The weight w of the newest member that minimises -mean log((1 - w) p_old + w p_new), by bisection; old, new: (tokens,)
    log-probabilities of the fitness set under the mixture so far and under that member.
    """
    old, new = old.double().exp(), new.double().exp()
    low, high = 0.0, 1.0
    for _ in range(50):
        w = (low + high) / 2
        falls = ((new - old) / (old + w * (new - old)).clamp(min=1e-300)).mean() > 0
        low, high = (w, high) if falls else (low, w)
    return w


@torch.no_grad()
def mix_in(model, sequences, mixture, share, batch_size):
    """
    (1 - share) * a stored mixture + share * the model, on sequences (n, T + 1), as it is stored: "p", the STORED largest
    probabilities of every position, (n, T, k) float16, and "ids", their tokens, int16 (read without sign). What the
    mixture did not store is spread over the other tokens as the model spreads it. mixture None: the model alone.
    """
    k, parts = min(STORED, model.config.vocab_size - 1), {"p": [], "ids": []}
    for i, rows in enumerate(torch.from_numpy(sequences.astype("int64")).split(batch_size)):
        x = model.hidden(rows[:, :-1].to(model.device)).flatten(0, 1)
        part = slice(i * batch_size, i * batch_size + len(rows))
        before = mixture and [z.to(x.device).flatten(0, 1) for z in unpack(mixture["p"][part], mixture["ids"][part])]
        for chunk in chunks(x, model.config.vocab_size):
            p = new = model.logits(x[chunk]).softmax(dim=-1)                    # n, V
            if before:
                old, ids = (z[chunk] for z in before)
                rest = new.scatter(-1, ids, 0)                                  # spreads what was not stored
                rest *= (1 - old.sum(dim=-1, keepdim=True)).clamp(min=0) / rest.sum(dim=-1, keepdim=True).clamp(min=1e-30)
                p = (1 - share) * rest.scatter(-1, ids, old) + share * new
            p, ids = p.topk(k, dim=-1)
            parts["p"].append(p.half().cpu())
            parts["ids"].append(ids.to(torch.int16).cpu())
    return {name: torch.cat(part).view(len(sequences), -1, k) for name, part in parts.items()}


def unpack(p, ids):
    """Stored probabilities as float32, their tokens as int64."""
    return p.float(), ids.long() & 0xFFFF


class Mixture:
    """
    loss_for_cycle where the mixture of the trajectory's members so far teaches, by its probabilities stored on the packings:
    every new member is run over them once, and mixed in with the share that serves the fitness set best.
    """

    def __init__(self, config):
        self.config, self.model = config, None

    def members(self, launch, trajectory):
        """(run, t, c) of those that teach this cycle, in the order in which they are mixed in."""
        return [(launch.run, trajectory.t, c) for c in range(trajectory.cycles_done)]

    def share(self, n, old, new):
        """The weight with which the n-th member (from 1) joins; old, new: log p of the fitness set."""
        return newest_share(old, new)

    def __call__(self, launch, trajectory):
        members, packings, t = self.members(launch, trajectory), trajectory.batches, trajectory.t
        parts = [(packing, part) for packing in range(1, self.config.packings + 1)
                 for part in range(math.ceil(packings.per_packing / PART))]
        self.store(launch, trajectory, members, parts)
        if launch.stop.agreed:
            return None
        stored = {place: launch.run.read_mixture(t, len(members), place, check=launch.world.lead) for place in parts}

        def rows(name, numbers):
            """Of the sequences of these numbers: (B * T, k)."""
            # on the CPU: the GPU does not wait
            places = [divmod(number, packings.per_packing) for number in numbers.tolist()]
            found = torch.stack([stored[packing + 1, i // PART][name][i % PART] for packing, i in places])
            return launch.world.to_device(found).flatten(0, 1)

        def loss(student, batch, numbers):
            return distilled_loss(student, batch, self.config.distill_alpha, stored_kl,
                                  *unpack(rows("p", numbers), rows("ids", numbers)))
        return loss

    def store(self, launch, trajectory, members, parts):
        """Make what is not there of the mixture of these members, the ranks of a group side by side, or until asked to stop."""
        run, world, stop, t = launch.run, launch.world, launch.stop, trajectory.t
        sha = [source.read_member(*which, check=False)[1]["sha256"] for source, *which in members]
        made_from = lambda n, place: sha256_of([sha[:n], place, PART, STORED])
        there = max((n for n in range(1, len(members) + 1)
                     if all(run.has_mixture(t, n, place, made_from(n, place)) for place in parts)), default=0)
        world.barrier()                                         # all have looked before one writes
        for n in range(there + 1, len(members) + 1):
            launch.bar.set_postfix_str(f"trajectory {t}: storing the mixture, member {n} of {len(members)}")
            mix = self.open_member(launch, trajectory, members[n - 1], n)
            for first in range(0, len(parts), world.data_size):            # a part for each rank, then ask whether to stop
                if first + world.data_rank < len(parts):
                    place = parts[first + world.data_rank]
                    if not run.has_mixture(t, n, place, made_from(n, place)):
                        run.save_mixture(t, n, place, mix(place), made_from(n, place))
                stop.agreed = world.mean(stop.asked)[0] > 0
                if stop.agreed:
                    return

    def open_member(self, launch, trajectory, member, n):
        """The function that mixes the n-th member into (packing, part) of the mixture of those before."""
        run, batches, (source, *which) = launch.run, trajectory.batches, member
        self.model = self.model or frozen(self.config, launch.world.device)
        self.model.load_state_dict(source.read_member(*which)[0])
        fit = torch.from_numpy(loader.score(self.model, launch.data.fit, self.config.micro_batch))

        def mix(place):
            packing, part = place
            sequences = batches.pack(packing)[part * PART:(part + 1) * PART]
            if n == 1:
                return {**mix_in(self.model, sequences, None, 1.0, self.config.micro_batch), "fit": fit}
            speak()                                             # any rank may be the one to find the file damaged
            old = run.read_mixture(trajectory.t, n - 1, place)
            speak(launch.world.lead)
            share = self.share(n, old["fit"], fit)
            mixed = ((1 - share) * old["fit"].double().exp() + share * fit.double().exp()).log().float()
            return {**mix_in(self.model, sequences, old, share, self.config.micro_batch), "fit": mixed}
        return mix


TEACHERS = {"predecessor": lambda config: OneMember(config, predecessor),      # distill_teacher's choices in config.py
            "best": lambda config: OneMember(config, best), "mixture": Mixture}


# ------------------------------------------------------------------------------------------------ one student

PACKINGS = 4                # on which the mixture teaches a student, where the population has none


def student_config(config):
    """The student's own: one model, one cosine, in run_dir/student."""
    return dataclasses.replace(
        config, run_dir=str(Path(config.run_dir) / "student"), trajectories=1, cycles=1,
        epochs_per_cycle=config.student_epochs, first_cycle_epochs=None,
        schedule="cosine", restart="noise", ema_decay=0.0, dropout=0.0, keep="all",
        packings=min(config.packings or PACKINGS, math.ceil(config.student_epochs)),
        distill_from=0, distill_teacher="mixture", distill_alpha=config.student_alpha, distill_temperature=1.0)


class Student(Mixture):
    """loss_for_cycle where the learned prior's mixture of a finished population teaches."""

    def __init__(self, config, taught_by, prior):
        super().__init__(student_config(config))
        # teachers: (entry in prior["members"], weight)
        self.source, (self.teachers, mixture) = taught_by, whole_mixture(prior)
        self.identity = dict(taught_by=mixture, student_from=config.student_from, student_epochs=config.student_epochs,
                             student_alpha=config.student_alpha)
        self.best = prior["members"][next(a for a in prior["answers"] if a["rule"] == "best")["members"][0]]
        for m in [self.best, *(m for m, _ in self.teachers)]:
            if taught_by.read_member(m["trajectory"], m["cycle"], check=False)[1]["sha256"] != m["weights_sha256"]:
                refuse(f"{taught_by.path / 'prior.json'} weighs other members than those that are there: run prior.py again")

    def members(self, launch, trajectory):
        return [(self.source, m["trajectory"], m["cycle"]) for m, _ in self.teachers]

    def share(self, n, old, new):
        weights = [w for _, w in self.teachers[:n]]
        return weights[-1] / sum(weights)

    def __call__(self, launch, trajectory):
        if trajectory.step == 0 and self.identity["student_from"] == "best":        # its first weights
            trajectory.model.load_state_dict(self.source.read_member(self.best["trajectory"], self.best["cycle"])[0])
        return super().__call__(launch, trajectory)


def teach_student(config, argv):
    """Train it, where that is not done, and keep it as run_dir/student.pt; the mixture that taught it goes."""
    data, prior, lead = loader.load(config), read_prior(config.run_dir), first_rank()
    run = Run(config, data.fingerprint)
    student = Student(config, run, prior)
    own = Run(student.config, data.fingerprint, mend="move it and student.pt away to train this one", **student.identity)
    if lead:
        print(f"a student of the learned prior's {len(student.teachers)} members with weight, "
              f"of {len(prior['members'])} (of {config.trajectories} x {config.cycles}), from {config.student_from}")
    with one_line_errors(student.config):
        run_cycles(student.config, 0, 1, student, next_command("distill.py", [*argv, "--student"]), **student.identity)
        if lead:
            weights, about = own.read_member(0, 0)
            with StopSignals():
                sweep(run.path, ".student.pt.*")
                run.save_member(*STUDENT, weights, epochs=prior["growing"][-1]["epochs"] + config.student_epochs,
                                fit_loss=about["fit_loss"], **student.identity)
                own.drop_mixtures(0)
    say_next("prior.py", argv)


def main(argv=None):
    options, argv = take_actions(argv, student=False)
    config = from_args(argv, __doc__)
    if options.student:
        return teach_student(config, argv)
    if config.distill_from < config.cycles:
        with one_line_errors(config):
            run_cycles(config, config.distill_from, config.cycles, TEACHERS[config.distill_teacher](config),
                       next_command("distill.py", argv))
    elif first_rank():
        print(f"no chain: distill_from={config.distill_from} is not below cycles={config.cycles}")
    say_next("prior.py", argv)


if __name__ == "__main__":
    main()
