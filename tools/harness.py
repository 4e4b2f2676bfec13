"""
lm-evaluation-harness as tools.evaluate needs it: an LM of its kind, which first notes what it is asked and
then answers from scores, and the task's metrics of such answers.
"""
import collections
import functools
import itertools
import math

import numpy as np
from lm_eval.api import metrics
from lm_eval.api.model import TemplateLM

from infra.console import progress_bar


def values_of(task, lm):
    """Metric -> the value of each question, by the task's own rules, as in the harness's evaluate()."""
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
    return values


def figures(task, values):
    """Metric -> (its value, (questions,) float64 where it is their mean, else None), of values_of()."""
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


def report(asked, answers, log_p_of):
    """
    [dict] of every task of asked, see evaluate.ask(), answer (rule, K, run, {member: weight}), mix and
    separator. log_p_of: evaluate.mixed().
    """
    mixes = [(*answer, mix) for answer in answers
             for mix in (("tokens", "paper") if len(answer[-1]) > 1 else ("-",))]
    results, best = [], {}
    for (about, rows, task, lms), (rule, K, run, members, mix) in progress_bar(
            list(itertools.product(asked, mixes)), unit="answer", desc="answering"):
        log_p = log_p_of(run, about["scores"], rows, members, mix)
        for lm in lms:
            lm.log_p = log_p
            found = figures(task, values_of(task, lm))          # the best member's come first
            results.append(dict(task=about["task"], separator=lm.separator, rule=rule, K=K, mix=mix,
                                metrics=compare(found, best.setdefault(lm, found))))
    return results
