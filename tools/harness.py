"""
lm-evaluation-harness as tools.evaluate needs it: its tasks, with the hub's questions or local ones, and an LM
of its kind, which first notes what it is asked and then answers from scores.
"""
import collections
import difflib
import functools
import hashlib
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


# --------------------------------------------------------------------------------------------- the tasks

@functools.cache
def task_files():
    """Task -> the YAML file that defines it. The harness's own index takes ten times as long."""
    name, root = re.compile(r"^task: *[\"']?([\w.-]+)", re.MULTILINE), Path(lm_eval.tasks.__file__).parent
    return {found: path for path in sorted(root.glob("**/*.yaml"))
            for found in name.findall(path.read_text(encoding="utf-8"))}


def read_questions(folder, name):
    """(rows as the hub has them, file, SHA-256) of a task. Exits with code 2 where there are none."""
    paths = [Path(folder) / f"{name}{ending}" for ending in ENDINGS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        fail(f"questions={folder}: has no questions of '{name}': put them there as '{paths[0].name}', a line "
             "of JSON for each question with the columns of the hub's data set")
    content = path.read_bytes()
    try:
        rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        dataset = datasets.Dataset.from_list(rows)
    except Exception as e:          # not text, not JSON, no dicts, columns of several types
        fail(f"'{path}' is not a file of questions ({type(e).__name__}: {e}): it must have a line of JSON "
             "for each, with the columns of the hub's data set")
    if not rows:
        fail(f"'{path}' is empty: it must have a line of JSON for each question")
    return dataset, path, hashlib.sha256(content).hexdigest()


def load_task(name, folder="", limit=0, lms=()):
    """
    (the harness's task, with the requests of its first `limit` questions (0: all); about: where they are
    from), after each of lms, which differ in what they call greedy, was asked once. folder: of local
    questions, each file for every split; "": the hub. Exits with code 2 where the task is unknown, few-shot,
    not scored by log-likelihood alone, or its questions are not there or have other columns.
    """
    if name not in task_files():
        near = difflib.get_close_matches(name, task_files(), n=1, cutoff=0)
        fail(f"tasks={name}: lm-evaluation-harness has no such task: did you mean '{near[0]}'?")
    spec, source, about = {"task": name}, "the hub", {"task": name, "source": "the hub"}
    if folder:
        rows, path, about["sha256"] = read_questions(folder, name)
        about["source"], source = path.name, f"'{path}', of columns {', '.join(rows.column_names)}"
        splits = collections.defaultdict(lambda: rows, train=rows, validation=rows, test=rows)
        spec["custom_dataset"] = lambda **_: splits
    folders = [str(task_files()[name].parent)]
    try:
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
        # inside a group, where settings of its own may stand beside a task's name
        task = manager.load({"group": "asked", "task": [spec]})["tasks"][name]
        if task.OUTPUT_TYPE not in SCORED:
            fail(f"tasks={name}: wants generated text; only tasks scored by log-likelihood can be asked")
        if task.config.num_fewshot:
            fail(f"tasks={name}: is few-shot (num_fewshot={task.config.num_fewshot}); only zero-shot tasks "
                 "can be asked")
        task.build_all_requests(limit=limit or None)
        for doc in {i.doc_id: i.doc for i in task.instances}.values():
            check_gold(task, doc)
        found = [{metric: str(value) for metric, (value, _) in figures(task, lm).items()} for lm in lms]
    except Exception as e:          # other columns, no network: the harness raises nearly anything
        fail(f"tasks={name}: cannot use its questions from {source} ({type(e).__name__}: {e}): they need "
             "the columns of the hub's data set, and the hub a network; --questions=FOLDER has local ones")
    for metric in found[0] if found else ():
        if any(other[metric] != found[0][metric] for other in found):
            fail(f"tasks={name}: its metric '{metric}' asks what greedy decoding gives, for which a "
                 "mixture's probabilities of the whole vocabulary would have to be kept: leave it out")
    return task, dict(about, questions=len({i.doc_id for i in task.instances}), version=task.VERSION,
                      lm_eval=lm_eval.__version__)


def check_gold(task, doc):
    """ValueError where the answer is none of the choices: the harness would count the question as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    gold, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
    right = gold if isinstance(gold, list) else [gold]
    if not all(i in choices if isinstance(i, str) else 0 <= i < len(choices) for i in right):
        raise ValueError(f"the answer {gold!r} is none of the {len(choices)} choices")


def figures(task, lm):
    """
    Metric -> (its value, (questions,) float64 where it is their mean, else None), by the task's own rules,
    of an LM's answers. Like the harness's evaluate(), which builds the requests again for every LM.
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
    Metric -> its value; where it is a mean over questions with its standard error, the difference to the best
    member's and that one's standard error on the same questions. Both as figures() gives them.
    """
    def error(values):
        return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    rows = {metric: dict(value=float(value)) for metric, (value, _) in found.items()}
    for metric, (_, values) in found.items():
        if values is not None:
            difference = values - best[metric][1]
            rows[metric] |= dict(error=error(values), difference=difference.mean(),
                                 paired_error=error(difference))
    return rows


# ------------------------------------------------------------------------------------------------ the LM

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
    The LM that the harness asks. It notes every window of ids in rows, {(ids, n): place}, once, so that equal
    choices score equally, and answers by log_p, (rows,) in nats; while that is None, by 0. separator: whether
    every prompt starts with the id that starts a document in training. Whether an answer is greedy is not
    known: yes with the separator, no without, so that a metric that asks shows before a member is read.
    """

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

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_):
        for (context, continuation), _, ids in requests:
            if not ids:             # a token of BPE spans the two; with nothing to score it would always win
                raise ValueError(f"'{continuation}' has no token of its own after '{context[-40:]}'")
        return [(self.total(context, continuation), self.separator) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [self.total([self.eot_token_id], text) for text in texts]

    def generate_until(self, requests, disable_tqdm=True):
        raise NotImplementedError("tools.generate is for text")
