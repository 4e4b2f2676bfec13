"""
The tasks of lm-evaluation-harness as tools.evaluate needs them, with the hub's questions or local ones.
"""
import collections
import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import re
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from infra.console import fail
from tools.harness import figures, values_of

SCORED = "multiple_choice", "loglikelihood", "loglikelihood_rolling"
ENDINGS = ".jsonl", "_test.jsonl", "_validation.jsonl"      # of a file of questions, after the task's name
logging.getLogger("lm_eval").setLevel(logging.ERROR)
datasets.disable_progress_bars()


@functools.cache
def task_files(folder=""):
    """
    Task -> the YAML file that defines it, of the harness and, before that, of one's own in a folder. The
    harness's own index takes ten times as long.
    """
    paths = sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"))
    if folder:
        paths += sorted(Path(folder).expanduser().glob("*.yaml"))
    return {found: path for path in paths for found in re.findall(
        r"""(?m)^["']?task["']?: *["']?([^\s"'#]+)""", path.read_text("utf-8", errors="replace"))}


def tasks_of(part, index):
    """The tasks behind a name in the harness's index, or behind a dict or list in a name's place."""
    part = part.get("task", part.get("group")) if isinstance(part, dict) else part
    if isinstance(part, str):
        if part in task_files():
            return [part]
        entry = index.get(part)             # a group has a file, and in it its parts; a tag its tasks
        part = [] if entry is None else sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]
    return [task for inner in part or () for task in tasks_of(inner, index)]


def find_task(name, folder):
    """The YAML file that defines a task. Exits with code 2 where there is none."""
    files = task_files(folder)
    if name not in files:
        inside = tasks_of(name, lm_eval.tasks.TaskManager().task_index)     # takes seconds
        near = inside[:3] or difflib.get_close_matches(name, files, n=1, cutoff=0)
        fail(f"tasks={name}: lm-evaluation-harness has no such task (a group is asked by its tasks): did you "
             f"mean {', '.join(map(repr, near))}?")
    return files[name]


def check_kind(name, kind, shots):
    """Exits with code 2 where a task cannot be asked, whatever its questions."""
    if kind not in SCORED or shots:
        fail(f"tasks={name}: is {kind}, with num_fewshot={shots or 0}: only zero-shot tasks that are scored "
             "by log-likelihood can be asked")


def read_questions(folder, name, needed):
    """
    (rows as the hub has them, file, SHA-256) of a task. Exits with code 2 where there are none; needed: what
    columns they must have, in words.
    """
    paths = [Path(folder).expanduser() / f"{name}{ending}" for ending in ENDINGS]
    path = next(filter(Path.exists, paths), None) or fail(
        f"questions={folder}: has no questions of '{name}': put them there as '{paths[0].name}', a line of "
        f"JSON for each question, with {needed}")
    content = path.read_bytes()
    try:
        rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        if len({frozenset(row) for row in rows}) != 1:      # what lacks would be None, and asked so
            raise ValueError("it is empty, or some lines have other columns")
        dataset = datasets.Dataset.from_list(rows)
    except Exception as e:          # not text, not JSON, no dicts, columns of several types
        fail(f"'{path}' is not a file of questions ({type(e).__name__}: {e}): it must have a line of JSON "
             f"for each, with {needed}")
    return dataset, path, hashlib.sha256(content).hexdigest()


def load_task(name, folder="", limit=0, lms=()):
    """
    (the harness's task, with the requests of its first `limit` questions (0: all); about: where they are
    from), after each of lms, which differ in what they call greedy, was asked once. folder: of local
    questions, each file for every split, and of tasks of one's own, *.yaml; "": the hub. Exits with code 2
    where the task is unknown, few-shot, not scored by log-likelihood alone, or its questions are not there or
    have other columns.
    """
    path = find_task(name, folder)
    settings = load_yaml(path, resolve_func=False)
    if "class" not in settings:             # which says it itself, below
        check_kind(name, settings.get("output_type", "generate_until"), settings.get("num_fewshot"))
    hub = "/".join(filter(None, map(settings.get, ("dataset_path", "dataset_name"))))
    needed = f"the columns that '{path}' asks" + (f" of the data set '{hub}'" if hub else "")
    spec, source, about = {"task": name}, "the hub", {"task": name, "source": "the hub"}
    if folder:
        rows, file, about["sha256"] = read_questions(folder, name, needed)
        about["source"], source = file.name, f"'{file}', of columns {', '.join(rows.column_names)}"
        splits = collections.defaultdict(lambda: rows, train=rows, validation=rows, test=rows)
        spec["custom_dataset"] = lambda **_: splits
    try:
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=path.parent)
        # inside a group, where settings of its own may stand beside a task's name
        task = manager.load({"group": "asked", "task": [spec]})["tasks"][name]
        check_kind(name, task.OUTPUT_TYPE, task.config.num_fewshot)
        with contextlib.redirect_stderr(io.StringIO()):     # half a progress bar would stand before an error
            task.build_all_requests(limit=limit or None)
        for doc in {i.doc_id: i.doc for i in task.instances}.values():
            check_gold(task, doc)
        found = [values_of(task, lm) for lm in lms]
        for values in found:
            figures(task, values)
    except ModuleNotFoundError as e:
        fail(f"tasks={name}: the package '{e.name}' is missing, which '{path}' needs: pip install it")
    except Exception as e:          # other columns, no network: the harness raises nearly anything
        offline = "" if folder else "; the hub needs a network, --questions=FOLDER has local ones"
        fail(f"tasks={name}: cannot use its questions from {source} ({type(e).__name__}: {e}): they need "
             f"{needed}{offline}")
    for metric in found[0] if found else ():
        if len({str(values[metric]) for values in found}) > 1:          # of any question
            fail(f"tasks={name}: its metric '{metric}' asks what greedy decoding gives, for which a "
                 "mixture's probabilities of the whole vocabulary would have to be kept: leave it out")
    return task, dict(about, questions=len({i.doc_id for i in task.instances}), version=task.VERSION,
                      lm_eval=lm_eval.__version__)


def check_gold(task, doc):
    """ValueError where the answer is none of the choices: the harness would count the question as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):      # its own rules
        return
    column = task.config.doc_to_text if task.multiple_input else task.config.doc_to_target
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    for answer in gold if isinstance(gold, list) else [gold]:
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            if answer == column:            # the harness takes what is no column for the answer
                raise ValueError(f"the column {column!r}, of the answers, is missing")
            raise ValueError(f"the answer {gold!r} is none of the {len(choices)} choices")
