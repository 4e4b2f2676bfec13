"""
Who teaches whom: python results/teachers.py FOLDER [NAME=TEXT ...]
(hours on 2 cores; FOLDER holds the runs, and is gone on with)
On the demo's model and sizes, for the manual and each further text (a .txt, .jsonl or .parquet): every teacher's weight alpha
is searched on documents that the reported runs never see; then three seeds of each teacher, of students, of a chain of
independent models and of single models, at equal epochs. Writes results/teachers.md from what is done.
"""
import collections
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args                                                # noqa: E402
from data import loader, prepare                                            # noqa: E402
from data.tokenizer import get_tokenizer                                    # noqa: E402
from distill import STORED, mix_in, newest_share, stored_kl, student_config, unpack      # noqa: E402
from files import read_json                                                 # noqa: E402
from population import Run, mixture_bytes                                   # noqa: E402
from prior import fit_weights, load_member, model_to_score                                  # noqa: E402
from results.demo import commit, loss_of as loss                            # noqa: E402
from tools import plan                                                      # noqa: E402

SEEDS, ALPHAS = (42, 1042, 2042), (0.45, 0.7, 0.85)
TINY, SINGLE = "configs/tiny.py", "configs/single.py"
ONE = ["--trajectories=1"]
TEACHERS = {                    # name: flags; alpha is searched
    "chain": ["--distill_temperature=1"],
    "best": ["--distill_temperature=1", "--distill_teacher=best"],
    "mixture": ["--distill_temperature=1", "--distill_teacher=mixture", "--packings=4"],
}
FRESH = ["--trajectories=1", "--restart=fresh", "--schedule=warmdown", "--momentum_warmup=300",
         "--ema_decay=0.95", "--ema_every=5", "--ema_share=0.4"]
RECORD11 = [*FRESH, "--cycles=5", "--first_cycle_epochs=8", "--epochs_per_cycle=14",
            "--distill_from=1", "--distill_alpha=0.7", "--distill_temperature=1"]
ALONE = [*FRESH, "--cycles=4", "--epochs_per_cycle=16", "--distill_from=4"]            # as many epochs and answering members


@dataclasses.dataclass(eq=False)            # each its own key of what is cached
class Job:
    """A population (config, flags), and a student of it (its flags, or None) in a copy of its directory."""
    name: str
    text: str                   # manual, edu, ...; tune_manual, ...
    seed: int
    config: str
    flags: list
    student: list | None = None
    of: object = None           # the population's Job
    noise: float = 1.0          # multiplies the noise between cycles, which is no setting of the scripts

    def folder(self, root):
        return root / self.text / f"{self.name}_{self.seed}"


def tuning_text(folder, name, source):
    """The documents of a text that a run of the demo's sizes does not reach, as a .jsonl of its own."""
    path = folder / f"tune_{name}.jsonl"
    documents, encode, config = prepare.source_documents(source), get_tokenizer("bytes")[0], from_args([str(ROOT / TINY)], "")
    left = config.val_tokens + config.train_tokens
    with open(path, "w") as f:
        for i in np.random.default_rng(prepare.SHUFFLE_SEED).permutation(len(documents)):
            if left <= 0:
                f.write(json.dumps({"text": documents[i]}) + "\n")
            left -= 1 + len(encode(documents[i]))
    return path


def call(script, job, root, texts, *more):
    name = script.removesuffix(".py")
    louder = (f"import sys, train, {name}; train.NOISE_FIRST *= {job.noise}; train.NOISE_LAST *= {job.noise}; "
              f"{name}.main(sys.argv[1:])")
    command = [sys.executable, *(script.split() if job.noise == 1 else ["-c", louder]), job.config, *job.flags,
               f"--seed={job.seed}", f"--run_dir={job.folder(root)}",
               f"--data={texts[job.text]}", f"--data_dir={root / 'data' / job.text}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")


LOCKS = collections.defaultdict(threading.Lock)


def run(job, root, texts):
    """prior.json of a job; what is done is not done again."""
    folder = job.folder(root)
    finished = folder / "prior.json"
    if job.of:
        run(job.of, root, texts)
    with LOCKS[folder]:
        work(job, folder, finished, root, texts)
    return read_json(finished)


def attempt(job, root, texts):
    """run(), but one that fails is reported, and the others go on."""
    try:
        run(job, root, texts)
    except Exception as e:
        print(job.text, job.name, job.seed, "failed:", e, file=sys.stderr, flush=True)


def work(job, folder, finished, root, texts):
    if job.student is None:
        if not finished.exists():
            for script in ("train.py", "distill.py", "prior.py"):
                call(script, job, root, texts)
    elif not (folder / "student.pt").exists() or all(a["rule"] != "student" for a in read_json(finished)["answers"]):
        if not folder.exists():
            half = folder.with_name(folder.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(job.of.folder(root), half).rename(folder)
        call("distill.py", job, root, texts, "--student", *job.student)
        call("prior.py", job, root, texts, *job.student)
    print(job.text, job.name, job.seed, "done", flush=True)


# ------------------------------------------------------------------------------------------------ what is run

def searches(text):
    """(name, alpha) -> Job: every teacher, and students of mixture-taught populations, on the further split."""
    jobs = {(name, alpha): Job(f"{name}_{alpha}", f"tune_{text}", 42, TINY, [*ONE, *flags, f"--distill_alpha={alpha}"])
            for name, flags in TEACHERS.items() for alpha in ALPHAS}
    sixteen = jobs["mixture", 0.7]
    eight = dataclasses.replace(sixteen, name="mixture8", flags=[*sixteen.flags, "--cycles=8"])
    for alpha in ALPHAS:
        for of, name, epochs in ((eight, "student", 16), (sixteen, "student_of_16", 8)):
            jobs[name, alpha] = dataclasses.replace(
                of, name=f"{name}_{alpha}", student=[f"--student_alpha={alpha}", f"--student_epochs={epochs}"], of=of)
    return jobs


def chosen(text, root):
    """
    name -> the alpha of lowest loss on the further split, of the learned prior and, with " member" behind the name, of the best
    member (of a student: its own); and (name, alpha) -> that loss.
    """
    found = {}
    for (name, alpha), job in searches(text).items():
        prior = read_json(job.folder(root) / "prior.json")
        found |= ({(name, alpha): loss(prior, "student")} if job.student else
                  {(name, alpha): loss(prior, "learned"), (f"{name} member", alpha): loss(prior, "best")})
    return {name: min(ALPHAS, key=lambda alpha: found[name, alpha]) for name, _ in found}, found


def noises(text):
    """Factor -> Job: the noise between cycles under a mixture that teaches, with the documents of the search."""
    one = searches(text)["mixture", 0.7]
    return {1.0: one} | {noise: dataclasses.replace(one, name=f"{one.name}_noise{noise:g}", noise=noise)
                         for noise in (0.5, 2.0)}


def reported(text, seed, alpha):
    """name -> Job of one seed; alpha: name -> that of the search."""
    job = lambda name, config, flags, **more: Job(name, text, seed, config, flags, **more)
    taught = lambda name, *flags: [*ONE, *TEACHERS[name.split()[0]], f"--distill_alpha={alpha[name]}", *flags]
    student = lambda of, epochs, *flags, search="student_of_16": job(
        f"student{epochs}_of_{of.name}{''.join(flags).replace('--student_from=', '_')}", of.config, of.flags, of=of,
        student=[f"--student_alpha={alpha[search]}", f"--student_epochs={epochs}", *flags])
    paper, mixed, single = (job("paper", TINY, ONE), job("mixture_member", TINY, taught("mixture member")),
                            job("single16", SINGLE, ["--epochs_per_cycle=16"]))
    eight, twelve = (job(f"mixture{n}", TINY, taught("mixture member", f"--cycles={n}")) for n in (8, 12))
    best = job("best_member", TINY, taught("best member"))
    jobs = [paper, mixed, best, single, eight, twelve,
            job("none", TINY, [*ONE, "--distill_from=16"]), *(job(name, TINY, taught(name)) for name in TEACHERS),
            job("chain_member", TINY, taught("chain member")), job("best24", TINY, taught("best member", "--cycles=24")),
            job("mixture_2packings", TINY, taught("mixture member", "--packings=2")),
            job("paper20", TINY, [*ONE, "--cycles=20"]), job("paper24", TINY, [*ONE, "--cycles=24"]),
            job("record11", TINY, RECORD11), job("independent", TINY, ALONE),
            *(job(f"single{e}", SINGLE, [f"--epochs_per_cycle={e}"]) for e in (8, 32, 64)),
            student(single, 16, search="student"), student(eight, 16, search="student"), student(twelve, 8),
            *(student(mixed, e) for e in (4, 8, 16, 32)), student(mixed, 16, "--student_from=scratch"),
            student(paper, 8), student(paper, 16), student(best, 16),
            job("paper_2x16", TINY, []), job("best_2x16", TINY, taught("best member", "--trajectories=2"))]
    return {j.name: j for j in jobs}


ORDER = [["paper", "mixture_member", "best_member", "paper24", "student16_of_mixture_member", "student16_of_paper"],
         ["none", "single8", "single16", "single32"], ["noises"], ["record11"],
         ["student8_of_mixture_member", "student8_of_mixture12"], ["paper_2x16"], ["chain_member"],
         ["student16_of_best_member"], ["student16_of_single16"], ["single64"], ["independent"],
         ["best24"], ["paper20"], ["best_2x16"], ["student16_of_mixture_member_scratch"],
         ["student32_of_mixture_member"], ["student4_of_mixture_member"],
         ["student8_of_paper"], ["student16_of_mixture8"], ["mixture_2packings"], ["mixture", "chain", "best"]]


def all_jobs(texts, root):
    """In order of interest, after the searches."""
    alpha, _ = chosen("manual", root)
    jobs = {text: {seed: reported(text, seed, alpha) for seed in SEEDS} for text in texts}
    for names in ORDER:
        yield from (noises("manual").values() if names == ["noises"] else
                    (jobs[text][seed][name] for text in texts for name in names for seed in SEEDS))


# ------------------------------------------------------------------------------------------------ what is said

def opened(job, root):
    """(config, data, run) of a finished job."""
    config = from_args([str(ROOT / job.config), *job.flags, f"--seed={job.seed}", f"--run_dir={job.folder(root)}",
                        f"--data_dir={root / 'data' / job.text}", *(job.student or [])], "")
    config.data = read_json(job.folder(root) / "config.json")["config"]["data"]
    data = loader.load(config)
    return config, data, Run(config, data.fingerprint)


@functools.cache
def cost(job, root):
    """(training epochs, training FLOPs) in all, the student's and its teachers' passes included."""
    (config, data, _), prior = opened(job, root), read_json(job.folder(root) / "prior.json")
    model, sequences = plan.meta_model(config), data.sequences_per_epoch
    flops, epochs = plan.flops_of(config, model, sequences), config.trajectories * config.epochs_until(config.cycles)
    total = flops["train.py"] + flops["distill.py"]
    if job.student:
        teachers = sum(w > 0 for w in max((a for a in prior["answers"] if a["rule"] == "learned"),
                                          key=lambda a: a["K"])["weights"])
        total += plan.student_flops(config, model, sequences, teachers)
        epochs += config.student_epochs
    return epochs, total


def mean_error(values):
    return (f"{np.mean(values):.4f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else
            f"{values[0]:.4f}")


def scores(job, root):
    """{split: (members, tokens) log-probabilities, the student's last}, of a finished job."""
    config, data, run = opened(job, root)
    return {split: torch.from_numpy(np.stack([run.read_scores(split, *m, getattr(data, split)[:, 1:].size)[0]
                                              for m in run.members() + run.student()])) for split in ("fit", "val")}


def running(log_p):
    """Validation loss of the mixture that teaches after each member: (with shares fitted one by one, fitted anew each time)."""
    rows, fit, val = [], None, None
    for n in range(len(log_p["fit"])):
        new = {split: log_p[split][n].double() for split in log_p}
        w = 1.0 if fit is None else newest_share(fit, new["fit"])
        fit, val = (old if w == 0 else new[s] if w == 1 else
                    torch.logaddexp(old + math.log(1 - w), new[s] + math.log(w)) for s, old in (("fit", fit), ("val", val)))
        weights, _ = fit_weights(log_p["fit"][:n + 1])
        rows.append((-val.mean().item(), -(weights @ log_p["val"][:n + 1].double().exp()).log().mean().item()))
    return rows


@functools.cache
def with_student(job, root):
    """Validation loss of the learned prior over all members and the student."""
    log_p = scores(job, root)
    weights, _ = fit_weights(log_p["fit"])
    return -(weights @ log_p["val"].double().exp()).log().mean().item()


def answers(job, prior, root):
    """[(what, price, validation loss)] of a finished job."""
    M = len(prior["members"])
    if job.student:
        return [("", 1, loss(prior, "student")),
                ("it and the members, learned prior", M + 1, with_student(job, root))][:1 if M == 1 else 2]
    if M == 1:
        return [("", 1, loss(prior, "best"))]
    rows = [("best member", 1, loss(prior, "best")), ("uniform, all", M, loss(prior, "uniform", M)),
            ("learned prior", M, loss(prior, "learned", M))]
    if job.name == "record11":
        rows[1] = ("uniform, the 4 of lowest fitness loss", M - 1, prior["losses"]["uniform"]["val"][M - 2])
    return rows


LABELS = {
    "paper": "predecessor, alpha 0.45, T 1.2 (the paper's)",
    "none": "no teacher",
    "chain": "predecessor, T 1",
    "best": "best so far",
    "mixture": "mixture so far",
    "chain_member": "predecessor, T 1, alpha for the best member",
    "best_member": "best so far, alpha for the best member",
    "mixture_member": "mixture so far, alpha for the best member",
    "mixture_2packings": "mixture so far on 2 packings, alpha for the best member",
    "mixture8": "mixture so far, alpha for the best member, 8 cycles",
    "mixture12": "mixture so far, alpha for the best member, 12 cycles",
    "record11": "record 11: 5 fresh models, each against the last",
    "independent": "record 11's recipe without a teacher: 4 independent models",
    "paper20": "the paper's, 20 cycles",
    "paper24": "the paper's, 24 cycles",
    "best24": "best so far, alpha for the best member, 24 cycles",
    "paper_2x16": "the paper's, 2 x 16",
    "best_2x16": "the trajectory's best so far, alpha for the best member, 2 x 16",
}


def label(job):
    if job.student:
        return (f"student of: {label(job.of)}; {job.student[1].partition('=')[2]} epochs"
                + ", from scratch" * ("--student_from=scratch" in job.student))
    return LABELS.get(job.name) or f"one model, one cosine, {job.name.removeprefix('single')} epochs"


def command_of(job):
    """What a job's scripts are called with, and its student's."""
    return " ".join([job.config, *job.flags] + (
        ["and then distill.py --student, prior.py with", *job.student, "too"] if job.student else []))


def table(text, root, alpha):
    """Lines of one text's table, of what is finished, and {name: [prior of each seed]}."""
    jobs = {seed: reported(text, seed, alpha) for seed in SEEDS}
    done = {name: [jobs[s][name] for s in SEEDS if finished(jobs[s][name], root)] for name in jobs[SEEDS[0]]}
    priors = {name: [read_json(j.folder(root) / "prior.json") for j in some] for name, some in done.items() if some}
    rows = []
    for name in priors:
        epochs, flops = np.mean([cost(j, root) for j in done[name]], axis=0)
        for of_seeds in zip(*(answers(j, p, root) for j, p in zip(done[name], priors[name]))):
            (what, price, _), losses = of_seeds[0], [x for *_, x in of_seeds]
            rows.append((epochs, f"| {label(done[name][0])}{': ' if what else ''}{what} | {epochs:g} | {flops / 1e12:.2f} | "
                                 f"{price} | {mean_error(losses)} | {', '.join(f'{x:.4f}' for x in losses)} |"))
    head = ["| | training epochs | TFLOP | price | validation loss | seeds |", "|---|---|---|---|---|---|"]
    return head + [row for _, row in sorted(rows, key=lambda r: r[0])], done, priors


def finished(job, root):
    path = job.folder(root) / "prior.json"
    return path.exists() and (not job.student or any(a["rule"] == "student" for a in read_json(path)["answers"]))


def teachers_of(done, root):
    """Lines: what each teacher makes of members and of their mixture, and of the mixture that taught."""
    lines = ["| 1 x 16 cycles | mean of the last 8 members | best member | learned prior | what mixing adds "
                 "| running mixture against refitted, mean of cycles 4 .. 15 |",
             "|---|---|---|---|---|---|"]
    for name in ("none", "paper", "chain", "chain_member", "best", "best_member", "mixture", "mixture_member",
                 "mixture_2packings"):
        found = []
        for job in done.get(name, []):
            prior, grown = read_json(job.folder(root) / "prior.json"), running(scores(job, root))
            last = np.mean([m["val_loss"] for m in prior["members"][-8:]])
            found.append((last, loss(prior, "best"), loss(prior, "learned"), loss(prior, "best") - loss(prior, "learned"),
                          np.mean([a - b for a, b in grown[3:15]])))
        if found:
            lines.append(f"| {LABELS[name]} | " + " | ".join(mean_error(column) for column in zip(*found)) + " |")
    return lines


def students_of(done, root):
    """Lines: how much of the mixture's gain over one model (one cosine, 16 epochs, of the same seed) each student keeps."""
    lines = ["| student | gain of its teachers' mixture over one model | kept by the student "
                 "| student's loss less the mixture's |", "|---|---|---|---|"]
    singles = {job.seed: loss(read_json(job.folder(root) / "prior.json"), "best") for job in done["single16"]}
    for name, jobs in done.items():
        found = []
        for job in jobs if name.startswith("student") else []:
            mixed, own = (loss(read_json(job.folder(root) / "prior.json"), rule) for rule in ("learned", "student"))
            gain = singles.get(job.seed, math.nan) - mixed
            found.append((gain, (singles.get(job.seed, math.nan) - own) / gain if gain else math.nan, own - mixed))
        if found:
            lines.append(f"| {label(jobs[0])} | "
                         + " | ".join(mean_error(column) for column in zip(*found)).replace("nan +- nan", "-") + " |")
    return lines


def curve_of(done, root):
    """Lines: loss against the epochs that a student was given."""
    lines = ["| epochs of a student of 16 cycles' mixture | the student | it and the members, learned prior |", "|---|---|---|"]
    taught = [read_json(j.folder(root) / "prior.json") for j in done.get("mixture_member", [])]
    if taught:
        lines.append(f"| none: the best member, the members' mixture | {mean_error([loss(p, 'best') for p in taught])} | "
                     f"{mean_error([loss(p, 'learned') for p in taught])} |")
    for epochs in (4, 8, 16, 32):
        some = done.get(f"student{epochs}_of_mixture_member")
        if some:
            own = [loss(read_json(j.folder(root) / "prior.json"), "student") for j in some]
            lines.append(f"| {epochs} | {mean_error(own)} | {mean_error([with_student(j, root) for j in some])} |")
    return lines


CLAIMS = [
    ("mixture_member", "learned prior", "paper", "learned prior"),
    ("mixture_member", "best member", "paper", "best member"),
    ("paper", "learned prior", "none", "learned prior"),
    ("student8_of_mixture12", "", "paper", "learned prior"),
    ("student16_of_mixture_member", "", "paper24", "learned prior"),
    ("student16_of_paper", "", "paper24", "learned prior"),
    ("student16_of_mixture_member", "it and the members, learned prior", "paper24", "learned prior"),
    ("student16_of_mixture_member", "", "paper_2x16", "learned prior"),
    ("student16_of_mixture_member", "it and the members, learned prior", "paper_2x16", "learned prior"),
    ("student16_of_mixture_member", "", "paper", "learned prior"),
    ("best_member", "learned prior", "paper", "learned prior"),
    ("best_member", "best member", "paper", "best member"),
    ("best_member", "learned prior", "chain_member", "learned prior"),
    ("chain_member", "learned prior", "paper", "learned prior"),
    ("best24", "learned prior", "paper24", "learned prior"),
    ("student16_of_best_member", "", "paper24", "learned prior"),
    ("student16_of_best_member", "it and the members, learned prior", "paper24", "learned prior"),
    ("student16_of_best_member", "", "paper_2x16", "learned prior"),
    ("student16_of_single16", "", "paper", "learned prior"),
    ("student8_of_mixture_member", "", "paper20", "learned prior"),
    ("student8_of_paper", "", "paper20", "learned prior"),
    ("student8_of_mixture_member", "it and the members, learned prior", "paper20", "learned prior"),
    ("student16_of_mixture8", "", "paper", "learned prior"),
    ("student16_of_mixture_member_scratch", "", "student16_of_mixture_member", ""),
    ("best_2x16", "learned prior", "paper_2x16", "learned prior"),
    ("best_2x16", "best member", "paper_2x16", "best member"),
    ("student32_of_mixture_member", "", "paper_2x16", "learned prior"),
    ("student32_of_mixture_member", "it and the members, learned prior", "paper_2x16", "learned prior"),
    ("record11", "uniform, the 4 of lowest fitness loss", "independent", "uniform, all"),
    ("record11", "learned prior", "paper_2x16", "learned prior"),
]


def differences_of(done, root):
    """Lines: who is how far below whom, seed by seed."""
    lines = ["| | epochs, TFLOP | beside | epochs, TFLOP | difference, negative where the first is better | seeds |",
             "|---|---|---|---|---|---|"]
    for name, what, other, its in CLAIMS:
        pairs = [(a, b) for a in done.get(name, []) for b in done.get(other, []) if a.seed == b.seed]
        if not pairs:
            continue
        value = lambda job, what: next(
            x for w, _, x in answers(job, read_json(job.folder(root) / "prior.json"), root) if w == what)
        spent = ["{:g}, {:.2f}".format(*np.mean([(e, f / 1e12) for e, f in (cost(j, root) for j in jobs)], axis=0))
                 for jobs in zip(*pairs)]
        found = [value(a, what) - value(b, its) for a, b in pairs]
        lines.append(f"| {label(pairs[0][0])}{': ' * bool(what)}{what} | {spent[0]} | "
                     f"{label(pairs[0][1])}{': ' * bool(its)}{its} | {spent[1]} | "
                     f"{mean_error(found)} | {', '.join(f'{x:+.4f}' for x in found)} |")
    return lines


def models_of(job, root):
    """Every member, in order, one after another in the same model."""
    config, data, run = opened(job, root)
    model = model_to_score(config).eval()
    for member in run.members():
        load_member(model, run, *member)
        yield model


@torch.no_grad()
def stored_error(job, root):
    """
    Of the mixture that taught last, on 32 sequences of the first packing: (the mass outside what is stored, KL(mixture ||
    newest member) over all tokens, the same from what is stored), means over positions, nats.
    """
    config, data, run = opened(job, root)
    batches = loader.Batches(data.train, data.doc_starts, config.sequence_len, config.epoch_multiple,
                             config.seed, config.packings)
    sequences, stored, exact, fit = batches.pack(1)[:32], None, 0, None
    for n, model in enumerate(models_of(job, root)):
        logits = model(torch.from_numpy(sequences[:, :-1].astype(np.int64)))
        if n == config.cycles - 1:
            break
        new = torch.from_numpy(loader.score(model, data.fit, config.micro_batch))
        share = 1.0 if n == 0 else newest_share(fit, new)
        fit = new if n == 0 else torch.logaddexp(fit + math.log(1 - share), new + math.log(share))
        stored, exact = mix_in(model, sequences, stored, share, 8), (1 - share) * exact + share * logits.double().softmax(-1)
    p, ids = unpack(stored["p"], stored["ids"])
    positions, student = exact[..., 0].numel(), logits.double().log_softmax(-1)
    return (1 - exact.gather(-1, ids).sum(-1).mean().item(), (exact * (exact.log() - student)).sum().item() / positions,
            stored_kl(logits, p, ids).item() / positions)


@torch.no_grad()
def tempered(job, root):
    """
    Validation loss of the learned prior, without and with a temperature for each member,
    chosen for it alone on the fitness set.
    """
    config, data, _ = opened(job, root)
    plain, warm = {"fit": [], "val": []}, {"fit": [], "val": []}
    for model in models_of(job, root):
        log_p = {split: {T: [] for T in TEMPERATURES} for split in plain}
        for split in plain:
            for rows in torch.from_numpy(getattr(data, split).astype(np.int64)).split(8):
                logits = model(rows[:, :-1]).flatten(0, 1)
                for T in TEMPERATURES:
                    log_p[split][T].append(-F.cross_entropy(logits / T, rows[:, 1:].flatten(), reduction="none"))
        log_p = {split: {T: torch.cat(parts) for T, parts in of_split.items()} for split, of_split in log_p.items()}
        T = max(TEMPERATURES, key=lambda T: log_p["fit"][T].mean())
        for split in plain:
            plain[split].append(log_p[split][1.0])
            warm[split].append(log_p[split][T])
    both = []
    for log_p in (plain, warm):
        weights, _ = fit_weights(torch.stack(log_p["fit"]))
        both.append(-(weights @ torch.stack(log_p["val"]).double().exp()).log().mean().item())
    return both


def on_paper():
    """Lines: what a stored mixture would cost at 1.8B parameters, counted, not run."""
    flags = lambda *more: from_args([str(ROOT / "configs" / "1p8b.py"), *more], "")
    lines = ["| configs/1p8b.py, 256 epochs | teacher's passes, epochs | training FLOP | hours on 8 H100 at 28 % "
                 "| stored mixtures, GB |", "|---|---|---|---|---|"]
    for label, config in (("no teacher", flags("--distill_from=64")), ("predecessor", flags()),
                          *((f"mixture, {n} packings",
                             flags("--distill_teacher=mixture", f"--packings={n}", "--distill_temperature=1"))
                            for n in (2, 4))):
        sequences = 48_736
        flops = plan.flops_of(config, plan.meta_model(config), sequences)
        total, taught = flops["train.py"] + flops["distill.py"], config.distill_from < config.cycles
        passes = config.trajectories * (
            (config.cycles - 1) * config.packings if config.packings else
            (config.cycles - config.distill_from) * config.epochs_per_cycle) * taught
        lines.append(f"| {label} | {passes:g} | {total:.3e} | {total / (8 * 989e12 * 0.28) / 3600:.0f} | "
                     f"{config.trajectories * 2 * mixture_bytes(config) / 1e9:.0f} |")
    config = flags()
    flops = plan.student_flops(config, plan.meta_model(config), 48_736, 128)
    lines.append(f"| a student of all 128, 8 epochs, beside it | {128 * student_config(config).packings} | {flops:.3e} | "
                 f"{flops / (8 * 989e12 * 0.28) / 3600:.0f} | {2 * mixture_bytes(student_config(config)) / 1e9:.0f} |")
    return lines


TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)


def report(root, texts):
    alpha, found = chosen("manual", root)
    lines = ["# Who teaches whom", "",
             f"Printed by `python results/teachers.py` at commit {commit()}: torch {torch.__version__}, "
                 f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread a run.",
             "configs/tiny.py's model, text sizes and rates; validation loss in nats per byte, "
                 "mean +- standard error over the seeds " + ", ".join(map(str, SEEDS)) + " (fewer where fewer are listed).",
             "TFLOP: model FLOPs of all training, teachers' passes included, as tools.plan counts "
                 "(not counted: scores on held-out text, which a mixture asks of each member). Price: members that answer.",
             "Not tried: cycles after the student, two trajectories that teach each other, "
                 "members trained by weights that are fitted anew (the two mixtures' losses are compared).", "",
             "## The search", "",
             "One seed each, on documents of the manual that no other run sees, fitness set and validation of their own; "
                 "16 members (the learned prior's loss, and the best member's), "
                 "students (their own) of 8 members with 16 epochs,",
             "and of 16 members (student_of_16) with 8. The second text takes the manual's choices. "
                 "No other alphas were tried, so the lowest and the highest are not bracketed; "
                 "the paper's chain, record 11 and the",
             "single models are as published or as before, without a search. "
                 "By hand, on the same documents and one seed, a student's schedule and dropout: "
                 "a cosine, not a cycle's line (1.7849 against 1.7918 of 8",
             "members at alpha 0.7; 1.7219 against 1.7228 of 16 at 0.85); dropout 0.1, not 0, is better of 8 members "
                 "(1.7741 against 1.7918) and worse of 16 (1.7405 against 1.7228), and stays out.", "",
             "| alpha | " + " | ".join(map(str, ALPHAS)) + " | chosen |", "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(f"{found[name, a]:.4f}" for a in ALPHAS) + f" | {alpha[name]} |" for name in alpha]
    lines += ["",
              "The noise between cycles, multiplied, under the mixture as teacher (alpha 0.7, the same documents, one seed), "
                  "learned prior and best member: "
              + "; ".join(f"x {n:g}: {loss(p, 'learned'):.4f}, {loss(p, 'best'):.4f}" for n, p in (
                  (n, read_json(j.folder(root) / "prior.json")) for n, j in noises("manual").items() if finished(j, root)))
              + "".join(f"; x {n:g} not yet run" for n, j in noises("manual").items() if not finished(j, root))]
    for text in texts:
        rows, done, _ = table(text, root, alpha)
        lines += ["", f"## {text}", "", *rows, "", *differences_of(done, root), "", *teachers_of(done, root), "",
                  *students_of(done, root), "", *curve_of(done, root)]
        if text == texts[0] and done.get("mixture_member"):
            outside, exact, stored = stored_error(done["mixture_member"][0], root)
            lines += ["", f"What is stored, after 15 members ({LABELS['mixture_member']}, one seed): "
                          f"{STORED} probabilities of {4 * STORED} bytes a token leave out {outside:.5f} of the mass; "
                          f"the KL that the last member meets is {stored:.4f} nats with them, {exact:.4f} exactly."]
        for name in ("paper", "mixture_member"):
            if text == texts[0] and done.get(name):
                plain, warm = tempered(done[name][0], root)
                lines += ["", f"A temperature for each member, chosen on the fitness set ({LABELS[name]}, one seed): "
                              f"{plain:.4f} without, {warm:.4f} with."]
    lines += ["", "## Commands", "",
              "train.py, distill.py and prior.py with the flags below and --seed, --run_dir, --data, --data_dir; "
                  "what has no row above is not yet run.", ""]
    lines += [f"- {label(job)}: `{command_of(job)}`" for job in reported(texts[0], SEEDS[0], alpha).values()]
    lines += ["", "## At 1.8B parameters, on paper", "",
              "A mixture takes about as many passes as the predecessor with as many packings "
                  "as a distilled cycle has epochs, 2: every member, the earliest too, teaches once on every packing.",
              f"{4 * STORED} bytes a token, two mixtures of each trajectory on disk at a time.", "", *on_paper()]
    (ROOT / "results" / "teachers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    if sys.argv[1] == "--report":               # of what is done so far
        return report(Path(sys.argv[2]), sys.argv[3:] or ["manual"])
    root, texts = Path(sys.argv[1]), {"manual": "manual", **dict(a.split("=") for a in sys.argv[2:])}
    root.mkdir(parents=True, exist_ok=True)
    sources = {**texts, "tune_manual": tuning_text(root, "manual", "manual")}
    for name in sources:
        call("-m data.prepare", Job("prepare", name, 42, TINY, []), root, sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in (searches("manual").values(), all_jobs(texts, root)):
            list(pool.map(lambda job: attempt(job, root, sources), some))
    report(root, list(texts))


if __name__ == "__main__":
    main()
