"""
Who teaches whom: python results/teachers.py FOLDER [NAME=TEXT ...]     (hours on 2 cores; FOLDER holds the runs, and is gone on with)
On the demo's model and sizes, for the manual and each further text (a .txt, .jsonl or .parquet): every teacher's weight alpha
is searched on documents that the reported runs never see; then three seeds of each teacher, of students, of a chain of
independent models and of single models, at equal epochs. Writes results/teachers.md from what is done.
"""
import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args                                                # noqa: E402
from data import prepare                                                    # noqa: E402
from data.tokenizer import get_tokenizer                                    # noqa: E402
from files import read_json                                                 # noqa: E402

SEEDS, ALPHAS = (42, 1042, 2042), (0.45, 0.7, 0.85)
TINY, SINGLE = "configs/tiny.py", "configs/single.py"
ONE = ["--trajectories=1"]
TEACHERS = {                    # name: flags; alpha is searched
    "chain": ["--distill_temperature=1"],
    "best": ["--distill_temperature=1", "--distill_teacher=best"],
    "mixture": ["--distill_temperature=1", "--distill_teacher=mixture", "--packings=4"],
}
RECORD11 = ["--trajectories=1", "--restart=fresh", "--schedule=warmdown", "--momentum_warmup=300", "--ema_decay=0.95", "--ema_every=10", "--ema_share=0.4",
            "--cycles=5", "--first_cycle_epochs=8", "--epochs_per_cycle=14", "--distill_from=1", "--distill_alpha=0.7", "--distill_temperature=1"]


@dataclasses.dataclass
class Job:
    """A population (config, flags), and a student of it (its flags, or None) in a copy of its directory."""
    name: str
    text: str                   # manual, edu, ...; tune_manual, ...
    seed: int
    config: str
    flags: list
    student: list | None = None
    of: object = None           # the population's Job

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
    command = [sys.executable, *script.split(), job.config, *job.flags, f"--seed={job.seed}", f"--run_dir={job.folder(root)}",
               f"--data={texts[job.text]}", f"--data_dir={root / 'data' / job.text}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-500:]}")


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


def work(job, folder, finished, root, texts):
    if job.student is None:
        if not finished.exists():
            for script in ("train.py", "distill.py", "prior.py"):
                call(script, job, root, texts)
    elif not (folder / "student.pt").exists() or all(a["rule"] != "student" for a in read_json(finished)["answers"]):
        if not folder.exists():
            shutil.copytree(job.of.folder(root), folder)
        call("distill.py", job, root, texts, "--student", *job.student)
        call("prior.py", job, root, texts, *job.student)
    print(job.text, job.name, job.seed, "done", flush=True)


def loss(prior, rule, K=None, split="val_loss"):
    return next(a[split] for a in reversed(prior["answers"]) if a["rule"] == rule and K in (None, a["K"]))


# ------------------------------------------------------------------------------------------------ what is run

def searches(text):
    """(name, alpha) -> Job: every teacher, and students of a mixture-taught population, on the further split."""
    jobs = {(name, alpha): Job(f"{name}_{alpha}", f"tune_{text}", 42, TINY, [*ONE, *flags, f"--distill_alpha={alpha}"])
            for name, flags in TEACHERS.items() for alpha in ALPHAS}
    eight = Job("mixture8", f"tune_{text}", 42, TINY, [*ONE, *TEACHERS["mixture"], "--cycles=8", "--distill_alpha=0.7"])
    for alpha in ALPHAS:
        jobs["student", alpha] = dataclasses.replace(eight, name=f"student_{alpha}", student=[f"--student_alpha={alpha}", "--student_epochs=16"], of=eight)
    return jobs


def chosen(text, root):
    """name -> the alpha of lowest loss on the further split: of the learned prior, or of the student."""
    found = {(name, alpha): loss(read_json(job.folder(root) / "prior.json"), "student" if job.student else "learned") for (name, alpha), job in searches(text).items()}
    return {name: min(ALPHAS, key=lambda alpha: found[name, alpha]) for name, _ in found}, found


def reported(text, seed, alpha):
    """name -> Job of one seed, in order of interest; alpha: name -> that of the search."""
    job = lambda name, config, flags, **more: Job(name, text, seed, config, flags, **more)
    taught = lambda name, *flags: [*ONE, *TEACHERS[name], f"--distill_alpha={alpha[name]}", *flags]
    eight, twelve = job("mixture8", TINY, taught("mixture", "--cycles=8")), job("mixture12", TINY, taught("mixture", "--cycles=12"))
    student = lambda of, epochs, *flags: job(f"student{epochs}_of_{of.name}{''.join(flags).replace('--student_from=', '_')}", TINY, of.flags, of=of,
                                             student=[f"--student_alpha={alpha['student']}", f"--student_epochs={epochs}", *flags])
    jobs = [job("paper", TINY, ONE), job("mixture", TINY, taught("mixture")), job("none", TINY, [*ONE, "--distill_from=16"]),
            student(eight, 16), student(twelve, 8), job("chain", TINY, taught("chain")), job("best", TINY, taught("best")),
            student(eight, 4), student(eight, 8), student(eight, 16, "--student_from=scratch"), job("mixture_2packings", TINY, taught("mixture", "--packings=2")),
            job("record11", TINY, RECORD11), *(job(f"single{e}", SINGLE, [f"--epochs_per_cycle={e}"]) for e in (8, 16, 32, 64)),
            job("paper_2x16", TINY, []), job("mixture_2x16", TINY, taught("mixture", "--trajectories=2")), student(eight, 32)]
    return {j.name: j for j in jobs}


def all_jobs(texts, root):
    """In order of interest, after the searches."""
    alpha, _ = chosen("manual", root)
    jobs = {text: {seed: reported(text, seed, alpha) for seed in SEEDS} for text in texts}
    for names in (["paper", "mixture", "none"], STUDENTS[:2], ["chain", "best"], STUDENTS[2:5], ["mixture_2packings"], ["single8", "single16", "single32", "record11"],
                  ["paper_2x16", "mixture_2x16"], ["single64"], STUDENTS[5:]):
        yield from (jobs[text][seed][name] for text in texts for name in names for seed in SEEDS)


STUDENTS = ["student16_of_mixture8", "student8_of_mixture12", "student4_of_mixture8", "student8_of_mixture8", "student16_of_mixture8_scratch", "student32_of_mixture8"]


def main():
    root, texts = Path(sys.argv[1]), {"manual": "manual", **dict(a.split("=") for a in sys.argv[2:])}
    root.mkdir(parents=True, exist_ok=True)
    sources = {**texts, "tune_manual": tuning_text(root, "manual", "manual")}
    for name in sources:
        call("-m data.prepare", Job("prepare", name, 42, TINY, []), root, sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in (searches("manual").values(), all_jobs(texts, root)):
            list(pool.map(lambda job: run(job, root, sources), some))


if __name__ == "__main__":
    main()
