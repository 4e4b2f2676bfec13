"""
Runs variants x seeds x texts and tabulates them:
python results/experiments.py PLAN FOLDER [NAME=TEXT ...] [--seeds=42,1042,2042] [--jobs=CORES]
PLAN is one of plans.PLANS; FOLDER holds the runs, a second call does only what is missing. The texts are the
manual and what NAME=TEXT adds (a .txt, .jsonl or .parquet); of the plan `rates`, a further split of the
manual alone. Each job is train.py, distill.py and prior.py on one thread. When all are done, writes
results/PLAN.csv (a row for each answer of each run) and results/PLAN.md, its table: mean +- standard error
over the seeds, and the paired differences that the plan asks for.
`python results/experiments.py PLAN` writes the page anew from the .csv alone.
"""
import argparse
import concurrent.futures
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import loader, prepare                        # noqa: E402
from infra.config import from_args, student_of          # noqa: E402
from infra.files import read_json, write_json           # noqa: E402
from results.plans import PLANS, TINY                   # noqa: E402
from tools import plan, plot                            # noqa: E402

RESULTS = ROOT / "results"


def further_text(folder):
    """{"further": a file of the manual's documents that are in neither split of configs/tiny.py}."""
    config, _ = from_args([str(ROOT / TINY), f"--data_dir={folder / 'manual' / 'data'}"], "")
    prepare.prepare(config)
    used = sum(len(loader.read_tokens(config, split)[1]) for split in ("val", "train"))
    documents = prepare.source_documents([Path(prepare.MANUAL)])
    order = np.random.default_rng(prepare.SHUFFLE_SEED).permutation(len(documents))
    path = folder / "further.jsonl"
    path.write_text("".join(json.dumps({"text": documents[i]}) + "\n" for i in order[used:]))
    return {"further": str(path)}


def commit():
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


# --------------------------------------------------------------------------------------------- the runs

def data_dir(variant, folder):
    """One for each amount of text: folder/data and what train_tokens is."""
    return folder / "".join(["data", *(f.partition("=")[2] for f in variant.flags if "train_tokens" in f)])


def arguments(variant, folder, source, *more):
    """Of a script, for a variant in folder."""
    return [str(ROOT / variant.config), *variant.flags, f"--run_dir={folder}", f"--data={source}",
            f"--data_dir={data_dir(variant, folder.parent)}", *more]


def scripts(names, variant, folder, source, seed, *more):
    """These scripts of a variant, one after another, in one process of one thread."""
    argv = arguments(variant, folder, source, f"--seed={seed}", *more)
    calls = "; ".join(f"{name}.main(sys.argv[1:])" for name in names.split())
    code = f"import sys, train, distill, prior\nfrom data import prepare\n{variant.change}\n{calls}"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{names} {' '.join(argv)}: {done.stderr[-500:]}")


def run(name, variant, folder, source, seed):
    """({commit, seconds}, prior.json) of a variant, trained and weighed in folder/NAME_SEED once."""
    own, began = folder / f"{name}_{seed}", time.monotonic()
    finished = own / "student" / "prior.json" if variant.student else own / "prior.json"
    about = own / "about.json"
    if not (finished.exists() and about.exists()):
        if variant.student and not own.exists():
            half = own.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            others = shutil.ignore_patterns("metrics.jsonl", "student", "about.json", ".*")
            shutil.copytree(folder / f"{variant.of}_{seed}", half, copy_function=os.link, ignore=others)
            half.rename(own)
        if variant.student:
            scripts("distill prior", variant, own, source, seed, "--student", *variant.student)
        else:
            scripts("train distill prior", variant, own, source, seed)
        write_json(about, dict(commit=commit(), seconds=round(time.monotonic() - began)))
    return read_json(about), read_json(finished)


def cost(variant, folder, source):
    """(training epochs, training TFLOP) in all, by tools.plan, the teachers' passes included."""
    config, _ = from_args(arguments(variant, folder / "none", source, *variant.student), "")
    sequences, model = loader.load(config).sequences_per_epoch, plan.meta_model(config)
    epochs = config.trajectories * config.epochs_until(config.cycles)
    flops = plan.flops_of(config, model, sequences)
    total = flops["train.py"] + flops["distill.py"]
    if variant.student:
        epochs += config.student_epochs
        total += plan.flops_of(student_of(config), model, sequences, config.student_teachers)["distill.py"]
    return epochs, total / 1e12


def run_all(name, root, texts, seeds, jobs):
    """All rows of the .csv, best first what others wait for: populations, then students."""
    variants, rows = PLANS[name][0], []
    for text, source in texts.items():
        (root / text).mkdir(parents=True, exist_ok=True)
        for variant in {data_dir(v, root): v for v in variants.values()}.values():
            scripts("prepare", variant, root / text / "none", source, seeds[0])
    todo = [(text, seed, key) for seed in seeds for text in texts for key in variants]
    todo.sort(key=lambda job: bool(variants[job[2]].student))
    bar = tqdm(total=len(todo), unit="run", desc=name)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, bar:
        for students in (False, True):
            futures = {pool.submit(run, key, variants[key], root / text, texts[text], seed): (text, seed, key)
                       for text, seed, key in todo if bool(variants[key].student) == students}
            for future in concurrent.futures.as_completed(futures):
                (text, seed, key), (about, prior) = futures[future], future.result()
                epochs, tflop = cost(variants[key], root / text, texts[text])
                of = dict(plan=name, text=text, sha256=prior["text"].get("text_sha256", "")[:16],
                          variant=key, seed=seed, commit=about["commit"], epochs=epochs,
                          tflop=round(tflop, 3), seconds=about["seconds"])
                rows += [dict(of, **{k: a[k] for k in ("rule", "K", "fit_loss", "val_loss")})
                         for a in prior["answers"]]
                write_rows(name, rows)              # all there are: this may be stopped and called again
                bar.update()
    if name == "demo":
        picture(root / "manual", variants, seeds)


def write_rows(name, rows):
    rows = sorted(rows, key=lambda r: (r["text"], r["variant"], int(r["seed"]), r["rule"], r["K"]))
    with open(RESULTS / f"{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def picture(folder, variants, seeds):
    priors = {name: [read_json(folder / f"{name}_{seed}" / "prior.json") for seed in seeds]
              for name in variants}
    beside = {variants[name].label: priors[name] for name in priors if name != "tiny"}
    plot.draw(priors["tiny"], RESULTS / "demo.png", beside)


# --------------------------------------------------------------------------------------------- the page

def mean_error(values, form=".4f"):
    error = f" +- {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def page(name):
    """Lines of the table and the differences, from results/NAME.csv."""
    with open(RESULTS / f"{name}.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    variants, pairs = PLANS[name]

    def label(key):             # of a variant that this code cannot run any more, its name
        return variants[key].label if key in variants else key

    of = {}             # (text, variant, rule, K) -> {seed: row}
    for r in rows:
        of.setdefault((r["text"], r["variant"], r["rule"], int(r["K"])), {})[r["seed"]] = r
    lines = []
    for text in dict.fromkeys(r["text"] for r in rows):
        lines += [f"\n## {text}\n", "| | epochs | TFLOP | rule | K | validation loss | seeds |",
                  "|---|---|---|---|---|---|---|"]
        for key in dict.fromkeys([*variants, *(r["variant"] for r in rows)]):
            for (_, _, rule, K), seeds in sorted(k for k in of.items() if k[0][:2] == (text, key)):
                some = list(seeds.values())
                losses = [float(r["val_loss"]) for r in some]
                lines.append(f"| {label(key)} | {some[0]['epochs']} | {some[0]['tflop']} | {rule} | {K} | "
                             f"{mean_error(losses)} | {', '.join(f'{x:.4f}' for x in losses)} |")
        if pairs:
            lines += ["\n| | less | difference (negative: the first is better) | seeds |",
                      "|---|---|---|---|"]
        for a, rule, b, other in pairs:
            first, second = ({k[3]: v for k, v in of.items() if k[:3] == (text, variant, its)}
                             for variant, its in ((a, rule), (b, other)))
            if first and second:
                x, y = first[max(first)], second[max(second)]       # of all members; best has K = 1 alone
                found = [float(x[s]["val_loss"]) - float(y[s]["val_loss"]) for s in x if s in y]
                lines.append(f"| {label(a)}: {rule} | {label(b)}: {other} | {mean_error(found)} | "
                             f"{', '.join(f'{d:+.4f}' for d in found)} |")
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    seeds = ", ".join(dict.fromkeys(r["seed"] for r in rows))
    texts = ", ".join(dict.fromkeys(f"{r['text']} {r['sha256']}" for r in rows))
    head = [f"# {name}", "",
            f"Printed by `python results/experiments.py {name}` from {name}.csv, at commit {commits}: torch "
            f"{torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}), one thread a run.",
            "Validation loss in nats per token (a token is a byte), mean +- standard error over the seeds "
            f"{seeds}; members and weights are chosen on the fitness set alone.", "",
            f"SHA-256 of the texts: {texts}. Flags:", ""]
    for v in variants.values():
        change = f", with `{v.change}`" if v.change else ""
        head.append(f"- {v.label}: `{' '.join([v.config, *v.flags, *v.student])}`{change}")
    return [*head, *lines]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("texts", nargs="*", metavar="NAME=TEXT")
    parser.add_argument("--seeds", default="42,1042,2042")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if not all("=" in text for text in options.texts):
        parser.error("a further text is written NAME=TEXT")
    if not options.folder and not (RESULTS / f"{options.plan}.csv").exists():
        parser.error(f"no results/{options.plan}.csv: name a FOLDER, to run the plan in it")
    if options.folder:
        folder = options.folder.resolve()
        named = dict(text.split("=", 1) for text in options.texts)
        texts = further_text(folder) if options.plan == "rates" else {"manual": "manual", **named}
        run_all(options.plan, folder, texts, options.seeds.split(","), options.jobs)
    lines = page(options.plan)
    (RESULTS / f"{options.plan}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
