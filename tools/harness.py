"""
lm-evaluation-harness as tools.evaluate needs it: its tasks, with the hub's questions or local ones, and an LM
of its kind, which first notes what it is asked and then answers from scores.
"""
import collections
import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import math
import re
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api import metrics
from lm_eval.api.model import TemplateLM

from infra.console import fail

SCORED = "multiple_choice", "loglikelihood", "loglikelihood_rolling"
ENDINGS = ".jsonl", "_test.jsonl", "_validation.jsonl"      # of a file of questions, after the task's name
logging.getLogger("lm_eval").setLevel(logging.ERROR)
datasets.disable_progress_bars()


@functools.cache
def task_files():
    """Task -> the YAML file that defines it. The harness's own index takes ten times as long."""
    return {found: path for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"))
            for found in re.findall(r"""(?m)^["']?task["']?: *["']?([^\s"'#]+)""", path.read_text("utf-8"))}


def tasks_of(part, index):
    """The tasks behind a name in the harness's index, or behind a dict or list in a name's place."""
    part = part.get("task", part.get("group")) if isinstance(part, dict) else part
    if isinstance(part, str):
        if part in task_files():
            return [part]
        entry = index.get(part)             # a group has a file, and in it its parts; a tag its tasks
        part = [] if entry is None else sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]
    return [task for inner in part or () for task in tasks_of(inner, index)]


def read_questions(folder, name):
    """(rows as the hub has them, file, SHA-256) of a task. Exits with code 2 where there are none."""
    paths = [Path(folder).expanduser() / f"{name}{ending}" for ending in ENDINGS]
    path = next(filter(Path.exists, paths), None) or fail(
        f"questions={folder}: has no questions of '{name}': put them there as '{paths[0].name}', a line of "
        "JSON for each question with the columns of the hub's data set")
    content = path.read_bytes()
    try:
        rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        if len({frozenset(row) for row in rows}) != 1:      # what lacks would be None, and asked so
            raise ValueError("it is empty, or some lines have other columns")
        dataset = datasets.Dataset.from_list(rows)
    except Exception as e:          # not text, not JSON, no dicts, columns of several types
        fail(f"'{path}' is not a file of questions ({type(e).__name__}: {e}): it must have a line of JSON "
             "for each, with the columns of the hub's data set")
    return dataset, path, hashlib.sha256(content).hexdigest()


def load_task(name, folder="", limit=0, lms=()):
    """
    (the harness's task, with the requests of its first `limit` questions (0: all); about: where they are
    from), after each of lms, which differ in what they call greedy, was asked once. folder: of local
    questions, each file for every split; "": the hub. Exits with code 2 where the task is unknown, few-shot,
    not scored by log-likelihood alone, or its questions are not there or have other columns.
    """
    if name not in task_files():
        inside = tasks_of(name, lm_eval.tasks.TaskManager().task_index)     # takes seconds
        near = inside[:3] or difflib.get_close_matches(name, task_files(), n=1, cutoff=0)
        fail(f"tasks={name}: lm-evaluation-harness has no such task (a group is asked by its tasks): did you "
             f"mean {', '.join(map(repr, near))}?")
    spec, source, about = {"task": name}, "the hub", {"task": name, "source": "the hub"}
    if folder:
        rows, path, about["sha256"] = read_questions(folder, name)
        about["source"], source = path.name, f"'{path}', of columns {', '.join(rows.column_names)}"
        splits = collections.defaultdict(lambda: rows, train=rows, validation=rows, test=rows)
        spec["custom_dataset"] = lambda **_: splits
    try:
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=task_files()[name].parent)
        # inside a group, where settings of its own may stand beside a task's name
        task = manager.load({"group": "asked", "task": [spec]})["tasks"][name]
        if task.OUTPUT_TYPE not in SCORED or task.config.num_fewshot:
            fail(f"tasks={name}: is {task.OUTPUT_TYPE}, with num_fewshot={task.config.num_fewshot}: only "
                 "zero-shot tasks that are scored by log-likelihood can be asked")
        with contextlib.redirect_stderr(io.StringIO()):     # half a progress bar would stand before an error
            task.build_all_requests(limit=limit or None)
        for doc in {i.doc_id: i.doc for i in task.instances}.values():
            check_gold(task, doc)
        found = [{metric: str(value) for metric, (value, _) in figures(task, lm).items()} for lm in lms]
    except Exception as e:          # other columns, no network: the harness raises nearly anything
        fail(f"tasks={name}: cannot use its questions from {source} ({type(e).__name__}: {e}): they need "
             "the columns of the hub's data set, and the hub a network; --questions=FOLDER has local ones")
    for metric in found[0] if found else ():
        if len({other[metric] for other in found}) > 1:
            fail(f"tasks={name}: its metric '{metric}' asks what greedy decoding gives, for which a "
                 "mixture's probabilities of the whole vocabulary would have to be kept: leave it out")
    return task, dict(about, questions=len({i.doc_id for i in task.instances}), version=task.VERSION,
                      lm_eval=lm_eval.__version__)


def check_gold(task, doc):
    """ValueError where the answer is none of the choices: the harness would count the question as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):      # its own rules
        return
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    for answer in gold if isinstance(gold, list) else [gold]:
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            raise ValueError(f"the answer {gold!r} is none of the {len(choices)} choices")


def figures(task, lm):
    """
    Metric -> (its value, (questions,) float64 where it is their mean, else None) of an LM's answers, by the
    task's own rules, as the harness's evaluate() does.
    """
    answers = getattr(lm, task.instances[0].request_type)(task.instances)
    questions, values = collections.defaultdict(list), collections.defaultdict(list)
    for instance, answer in zip(task.instances, answers):
        instance.resps = [answer]
        questions[instance.doc_id].append(instance)
    task.apply_filters()
    for instances in questions.values():
        responses = [next(iter(instance.filtered_resps.values())) for instance in instances]
        for metric, value in task.process_results(instances[0].doc, responses).items():
            values[metric].append(value)
    of = task.aggregation()
    return {metric: (of[metric](found), np.array(found, float) if of[metric] is metrics.mean else None)
            for metric, found in values.items()}


def compare(found, best):
    """
    Metric -> its value; where it is a mean over questions, its standard error, the difference to the best
    member's and that one's standard error. found and best: figures() of the same questions.
    """
    def error(values):
        return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    rows = {}
    for metric, (value, values) in found.items():
        rows[metric] = dict(value=float(value))
        if values is not None:
            gain = values - best[metric][1]
            rows[metric] |= dict(error=error(values), difference=gain.mean(), paired_error=error(gain))
    return rows


def windows(context, continuation, T):
    """
    [(ids, n)]: the last n ids are to be scored, after all before them, at least one. At most T + 1 ids, the
    last ones; a continuation longer than T is cut into pieces of T, as the harness cuts for a perplexity.
    """
    ids, starts = [*context, *continuation], range(len(context), len(context) + len(continuation), T)
    ends = [*starts[1:], len(ids)]
    return [(tuple(ids[max(0, end - T - 1):end]), end - start) for start, end in zip(starts, ends)]


class Adapter(TemplateLM):
    """
    The LM that the harness asks. It notes each window of ids once in rows, {(ids, n): place}, so that equal
    choices score equally, and answers by log_p, (rows,) in nats (None: by 0). separator: whether prompts
    start with a document's first id; also its word on greedy answers, unknown here: a metric that asks shows.
    """
    loglikelihood = functools.partialmethod(TemplateLM.loglikelihood, disable_tqdm=True)
    generate_until = None           # no task that wants text is loaded

    def __init__(self, config, encode, separator, rows):
        super().__init__()
        self.config, self.separator, self.rows, self.log_p = config, separator, rows, None
        self.encode = functools.cache(encode)

    @property
    def eot_token_id(self):
        return self.config.vocab_size - 1

    def tok_encode(self, string, add_special_tokens=None, **_):
        before = [self.eot_token_id] if self.separator and add_special_tokens is not False else []
        return before + self.encode(string)

    def total(self, context, continuation):
        """Natural log of the probability of the continuation's ids."""
        asked = windows(context or [self.eot_token_id], continuation, self.config.sequence_len)
        places = [self.rows.setdefault(row, len(self.rows)) for row in asked]
        return 0.0 if self.log_p is None else float(self.log_p[places].sum())

    def _loglikelihood_tokens(self, requests, **_):
        for (context, choice), _, ids in requests:
            if not ids:             # a token of BPE spans the two; with nothing to score it would always win
                raise ValueError(f"'{choice}' has no token of its own after '{context[-40:]}'")
        return [(self.total(context, continuation), self.separator) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return [self.total([self.eot_token_id], self.encode(request.args[0])) for request in requests]
