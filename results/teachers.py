"""
Who teaches whom: python results/teachers.py FOLDER [NAME=TEXT ...]     (hours on 2 cores; FOLDER holds the runs, and is gone on with)
On the demo's model and sizes, for the manual and each further text (a .txt, .jsonl or .parquet): every teacher's weight alpha
is searched on documents that the reported runs never see; then three seeds of each teacher, of students, of a chain of
independent models and of single models, at equal epochs. Writes results/teachers.md from what is done.
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
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
TINY, SINGLE, RECORD11 = "configs/tiny.py", "configs/single.py", "configs/record11_tiny.py"
ONE = ["--trajectories=1"]
TEACHERS = {                    # name: flags; alpha is searched
    "chain": ["--distill_temperature=1"],
    "best": ["--distill_temperature=1", "--distill_teacher=best"],
    "mixture": ["--distill_temperature=1", "--distill_teacher=mixture", "--packings=4"],
}


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


def run(job, root, texts):
    """prior.json of a job; what is done is not done again."""
    folder = job.folder(root)
    finished = folder / "prior.json"
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
    return read_json(finished)


def loss(prior, rule, K=None, split="val_loss"):
    return next(a[split] for a in reversed(prior["answers"]) if a["rule"] == rule and K in (None, a["K"]))


def searches(text):
    """Every teacher with every alpha, and students of the mixture's middle one, on the further split."""
    jobs = {(name, alpha): Job(f"{name}_{alpha}", f"tune_{text}", 42, TINY, [*ONE, *flags, f"--distill_alpha={alpha}"])
            for name, flags in TEACHERS.items() for alpha in ALPHAS}
    eight = Job("mixture8", f"tune_{text}", 42, TINY, [*ONE, *TEACHERS["mixture"], "--cycles=8", "--distill_alpha=0.7"])
    students = {("student", alpha): dataclasses.replace(eight, name=f"student_{alpha}", student=[f"--student_alpha={alpha}", "--student_epochs=16"], of=eight) for alpha in ALPHAS}
    return [list(jobs.values()) + [eight], list(students.values())], jobs | students


def main():
    root, texts = Path(sys.argv[1]), {"manual": "manual", **dict(a.split("=") for a in sys.argv[2:])}
    root.mkdir(parents=True, exist_ok=True)
    for name in [*texts]:
        texts[f"tune_{name}"] = tuning_text(root, name, texts[name])
    for name in texts:
        call("-m data.prepare", Job("prepare", name, 42, TINY, []), root, texts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for text in [t for t in texts if not t.startswith("tune_")]:
            for stage in searches(text)[0]:
                list(pool.map(lambda job: run(job, root, texts), stage))
    for text in [t for t in texts if not t.startswith("tune_")]:
        for (name, alpha), job in searches(text)[1].items():
            prior = read_json(job.folder(root) / "prior.json")
            print(text, name, alpha, "best", round(loss(prior, "best"), 4), "learned", round(loss(prior, "learned"), 4), "student" if job.student else "", round(loss(prior, "student"), 4) if job.student else "")


if __name__ == "__main__":
    main()
