"""
Downstream accuracy, zero-shot, by lm-evaluation-harness (pip install -r requirements-eval.txt).

One process:  python -m tools.evaluate CONFIG [--name=value ...]
Eight GPUs:   torchrun --nproc_per_node=8 -m tools.evaluate CONFIG, which share the members
Asks, after prior.py, the best member, for each K the uniform mixture and the learned prior, and the student
where there is one. A mixture's log-probability of a choice is that of its probabilities, token by token
(mix: tokens), or as in the paper the weighted mean of its members' log-probabilities, the logarithm of an
unnormalised geometric mean (mix: paper). Every member is read once, its scores are kept.
Prints each task's first metric. run_dir/evaluation.json has all of them, by task: a call replaces the entries
of its own tasks, and leaves out those of another prior, student or sequence_len.

Of its own: --tasks=arc_easy,piqa,sciq     any of the harness that are scored by log-likelihood
            --K=1,8,all            answers of prior.json: 1, 2, 4, ... and the number of members, or all
            --questions=FOLDER     of NAME.jsonl, NAME_test.jsonl or NAME_validation.jsonl, instead of the
                                   hub, and of tasks of your own, in the harness's form (*.yaml)
            --limit=N              the first N questions of every task; 0: all
"""
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.tokenizer import get_tokenizer
from infra.config import from_args, student_of
from infra.console import fail, print0, progress_bar, script
from infra.distributed import join
from infra.files import read_json, sha256_of, write_json
from infra.run_directory import RunDirectory, load_prior, prior_answer
from model import chunks
from prior import load_member, model_to_score

OPTIONS = dict(tasks="arc_easy,piqa,sciq", K="all", questions="", limit=0)


def listed(name, text):
    """The words of --name=a,b once each. Exits with code 2 where there are none."""
    return dict.fromkeys(filter(None, map(str.strip, text.split(",")))) or fail(f"{name}={text}: is empty")


def ask(config, options):
    """
    [(about, rows, task, LMs)] of each task: rows (ids, n), whose last n ids are to be scored; the harness's
    task; its LM with and without the separator before the prompt. Exits with code 2 where one cannot be.
    """
    if options.questions:           # before the import
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        from tools import harness, harness_tasks        # here: an extra, of forty packages
    except ImportError as e:
        fail(f"tools.evaluate needs lm-evaluation-harness ({e}): pip install -r requirements-eval.txt")
    asked, encode = [], get_tokenizer(config.tokenizer)[0]
    for name in listed("tasks", options.tasks):
        rows = {}
        lms = [harness.Adapter(config, encode, separator, rows) for separator in (True, False)]
        task, about = harness_tasks.load_task(name, options.questions, options.limit, lms)
        rows = list(rows)
        asked.append((dict(about, scores=f"{name}-{sha256_of(rows)[:16]}"), rows, task, lms))
    return asked


def choose(options, prior):
    """[(rule, K, {member: weight})], the best member first. Exits with code 2 where prior.json has none."""
    answers = [("best", 1)]
    for word in listed("K", options.K):
        K = len(prior["members"]) if word == "all" else int(word) if word.isdecimal() else word
        prior_answer(prior, K)
        answers += [(rule, K) for rule in ("uniform", "learned") if K > 1]
    return [(rule, K, {(m["trajectory"], m["cycle"]): w for m, w in prior_answer(prior, K, rule)})
            for rule, K in dict.fromkeys(answers)]


@torch.no_grad()
def score(model, rows, batch_tokens, done):
    """
    Log-probability in nats of the last n ids of every row (ids, n), one row after another, float32 numpy.
    The model is in eval mode; batch_tokens: the most in a batch, padding included; done(rows) hears of each.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))        # like lengths, the longest first
    log_p = [None] * len(rows)
    while order:
        size = max(1, batch_tokens // (len(rows[order[0]][0]) - 1))
        batch, order = order[:size], order[size:]
        ids, counts = [torch.tensor(rows[i][0]) for i in batch], [rows[i][1] for i in batch]
        idx = pad_sequence([row[:-1] for row in ids], batch_first=True)     # on the right, which nobody sees
        wanted = pad_sequence([torch.arange(1, len(row)) >= len(row) - n for row, n in zip(ids, counts)],
                              batch_first=True)
        targets = torch.cat([row[-n:] for row, n in zip(ids, counts)]).to(model.device)
        x = model.hidden(idx.to(model.device))[wanted.to(model.device)]     # these alone go through the head
        found = torch.cat([-F.cross_entropy(model.logits(x[chunk]), targets[chunk], reduction="none")
                           for chunk in chunks(x, model.config.vocab_size)])
        for i, tokens in zip(batch, found.cpu().split(counts)):
            log_p[i] = tokens
        done(len(batch))
    return torch.cat(log_p).numpy()


def score_members(config, members, questions, ranks):
    """
    Score members, {(t, c): SHA-256 of the weights}, on questions, {name: rows}, where there are no scores
    yet, spread over the ranks. Returns their run directory, which is locked while there is something to do.
    """
    run = RunDirectory(config, None)
    todo = [(m, [name for name in questions if run.load_scores(name, *m, check=False)[1] != sha256])
            for m, sha256 in members.items()]
    todo = ranks.of_first([(m, names) for m, names in todo if names])       # the same for all ranks
    if not todo:
        return run
    with run.open(ranks, "scores"):
        own = todo[ranks.rank::ranks.world_size]
        model = model_to_score(config).to_device(ranks.device).eval() if own else None
        total = sum(len(questions[name]) for _, names in own for name in names)
        bar = progress_bar(total=total, unit="row", desc="scoring", disable=ranks.rank > 0)
        for member, names in own:
            if load_member(model, run, *member) != members[member]:
                fail(f"'{run.member_path(*member)}' is not what prior.json weighed: run prior.py again")
            for name in names:
                log_p = score(model, questions[name], config.micro_batch * config.sequence_len, bar.update)
                run.save_scores(name, *member, log_p, members[member])
        bar.close()
        ranks.barrier(everyone=True)
    return run


def mixed(run, name, rows, members, mix):
    """Of every row of questions `name` its log-probability under a mixture, {member: weight}: float64."""
    log_p = ((w, run.load_scores(name, *member)[0].astype(np.float64)) for member, w in members.items())
    if mix == "paper":              # not a probability's: at most the logarithm of the mean
        tokens = sum(w * of_member for w, of_member in log_p)
    elif mix in ("tokens", "-"):    # -: of one member
        tokens = functools.reduce(np.logaddexp, (math.log(w) + of_member for w, of_member in log_p))
    else:
        raise ValueError(f"mix={mix}: must be tokens, paper or -")
    return np.add.reduceat(tokens, np.cumsum([0] + [n for _, n in rows[:-1]]))


def print_table(results):
    """Each task's first metric, with the separator before the prompt, and without."""
    def cells(metric):
        forms = dict(value=".4f", error=".4f", difference="+.4f", paired_error=".4f")
        return "".join(f" {'-' if metric.get(key) is None else format(metric[key], form):>7}"
                       for key, form in forms.items())
    print0(f"{'':46}with the separator before the prompt, and without")
    print0(f"{'task, metric':20} rule       K mix   " + f"{'':8}{'+-':>8}{'- best':>8}{'+-':>8}   " * 2)
    for row, other in zip(results[::2], results[1::2]):
        name = next(iter(row["metrics"]))
        print0(f"{row['task'] + ', ' + name:20} {row['rule']:8} {row['K']:>3} {row['mix']:6}"
               f"{cells(row['metrics'][name])}   {cells(other['metrics'][name])}")
    print0("- best: difference to the best member. +-: standard error; after the difference, that of the "
           "paired difference, question by question")


def write_by_task(path, same, entries):
    """Task -> its entry, and same in each; beside those of other tasks that are there and have the same."""
    there = read_json(path).get("by_task", {}) if path.exists() else {}
    kept = {task: entry for task, entry in there.items() if same.items() <= entry.items()}
    if gone := ", ".join(sorted(there.keys() - kept.keys() - entries.keys())):
        print0(f"note: '{path}' had figures of {gone} for another prior, student or sequence_len: left out")
    write_json(path, dict(by_task=kept | {task: entry | same for task, entry in entries.items()}))
    print0(f"wrote '{path}'")


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    if options.limit < 0:
        fail(f"limit={options.limit}: must be 0, all questions, or more")
    prior, student = load_prior(config.run_dir), student_of(config)
    chosen, taught = choose(options, prior), RunDirectory(student, None)
    ranks = join(config)
    asked = ask(config, options) if ranks.rank == 0 else []         # one rank fetches the questions
    questions = ranks.of_first({about["scores"]: rows for about, rows, *_ in asked})
    students = ranks.of_first(
        {m: taught.load_member(*m, check=False)[1]["tensors_sha256"] for m in taught.members()})
    wanted = {m for *_, weights in chosen for m in weights}
    members = {(m["trajectory"], m["cycle"]): m["weights_sha256"] for m in prior["members"]}
    run = score_members(config, {m: members[m] for m in sorted(wanted)}, questions, ranks)
    answers = [(rule, K, run, weights) for rule, K, weights in chosen]
    if students:
        answers.append(("student", 1, score_members(student, students, questions, ranks), {(0, 0): 1.0}))
    ranks.leave()
    if ranks.rank > 0:
        return
    from tools import harness
    results = harness.report(asked, answers, mixed)
    print_table(results)
    who = [dict(rule=rule, K=K, members=[[*m, w] for m, w in of.items()]) for rule, K, _, of in answers]
    same = dict(sequence_len=config.sequence_len, of=sha256_of([prior, sorted(students.values())]))
    write_by_task(run.path / "evaluation.json", same, {about["task"]: dict(
        about, answers=who, results=[row for row in results if row["task"] == about["task"]])
        for about, *_ in asked})


if __name__ == "__main__":
    main()
