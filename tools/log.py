"""
A run on a dashboard: python -m tools.log CONFIG --to=wandb [--name=value ...]
Sends the lines of run_dir/metrics.jsonl, and prior.json's losses for every K, to wandb, trackio or
tensorboard: those that are there or, with --follow, all until the population is finished. Called again it
goes on where it stopped (run_dir/log_wandb.json; without that file it begins a new run); when it was itself
killed, at most the last 1,000 lines are sent twice. train.py does not import it. After train.py was killed
some steps come again: the last line of a step holds, but what was sent stays.

Of its own: --to=wandb         its website; with WANDB_MODE=offline run_dir/wandb, for `wandb sync` later
            --to=trackio       TRACKIO_DIR, else the cache of Hugging Face; `trackio show` opens it
            --to=tensorboard   run_dir/tensorboard; `tensorboard --logdir=run_dir/tensorboard` opens it
            --project=q0    --follow    --student: the student's lines instead
"""
import contextlib
import importlib
import itertools
import json
import secrets
import time
from pathlib import Path

from infra.config import from_args, student_of
from infra.console import ROOT, fail, print0, progress_bar, script
from infra.distributed import stop_request
from infra.files import lock, read_json, write_json
from infra.run_directory import RunDirectory, load_prior

OPTIONS = dict(to="", project="q0", follow=False, student=False)

POLL = 2                    # seconds
LINES = 1000                # at most so many are sent again after a kill


# -------------------------------------------------------------------------------------------- where it goes
# each gives (send(values, step), flush()): what was sent before flush() outlives a kill

@contextlib.contextmanager
def to_wandb(wandb, run, project, name, lines):
    # its own step must never go back, but ours do, with every trajectory: they are a value and the x-axis
    settings = wandb.Settings(console="off", x_disable_stats=True)
    with wandb.init(project=project, id=name, name=name, resume="allow", dir=run.path, config=run.identity,
                    settings=settings) as there:
        there.define_metric("*", step_metric="step")
        count = itertools.count(lines)
        yield (lambda values, step: there.log({**values, "step": step}, step=next(count)),
               lambda: None)            # a process of its own, which outlives ours, has it already


@contextlib.contextmanager
def to_trackio(trackio, run, project, name, lines):
    there = trackio.init(project=project, name=name, resume="allow", config=run.identity, auto_log_cpu=False,
                         auto_log_gpu=False)
    yield there.log, lambda: time.sleep(1)          # its thread writes every half second
    there.finish()


@contextlib.contextmanager
def to_tensorboard(tensorboard, run, project, name, lines):
    with tensorboard.SummaryWriter(run.path / "tensorboard" / name) as there:
        def send(values, step):
            for key, value in values.items():
                there.add_scalar(key, value, step)
        yield send, there.flush


BACKENDS = {        # its package, how to begin, where the result is
    "wandb": ("wandb", to_wandb, "online, or in '{path}/wandb'"),
    "trackio": ("trackio", to_trackio, "trackio show --project {project}"),
    "tensorboard": ("torch.utils.tensorboard", to_tensorboard, "tensorboard --logdir='{path}/tensorboard'")}


# --------------------------------------------------------------------------------------------- what is sent

def is_record(line):
    """Whether it is one of the scripts': with a kind, and whole numbers that say where it belongs."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return False
    places = line.get("trajectory", 0), line.get("cycle", 0), line.get("step", line.get("cycle"))
    return all(type(n) is int and 0 <= n < 2 ** 31 for n in places)


def whole_lines(file):
    """The records of a binary file's whole lines from here on; what a kill tore, or is none, is left out."""
    records = []
    while (line := file.readline()).endswith(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            records += filter(is_record, [json.loads(line)])
    file.seek(-len(line), 1)            # the rest of it may still come
    return records


def prior_records(prior):
    """A record for every K, which is their step."""
    for K in range(1, len(prior["members"]) + 1):
        losses = {f"{rule}_{split}_loss": of[K - 1] for rule, splits in prior["losses"].items()
                  for split, of in splits.items() if K <= len(of)}
        yield dict(kind=f"prior_of_{len(prior['members'])}", step=K, **losses)


def unsent(records, sent):
    """
    [(series, step, values by name)] of the records that are new, of each step the last. sent: series -> its
    last step that was; a series is a kind of line in one cycle of a trajectory, and its steps only rise.
    """
    last = {}
    for record in records:
        about = {key: record.pop(key) for key in ("kind", "trajectory", "cycle", "step") if key in record}
        step = about.pop("step", about.get("cycle"))
        last[" ".join(map(str, about.values())), step] = about, record
    for (series, step), (about, values) in last.items():
        if step > sent.get(series, -1):
            where = f"trajectory_{about['trajectory']:02d}/" if "trajectory" in about else ""
            yield series, step, {f"{where}{about['kind']}/{name}": value for name, value in values.items()
                                 if isinstance(value, int | float)}


def send_new(new, send, save, state, stop):
    """Send what unsent() gives, and note it in state, until all is sent or it is asked to stop; save it."""
    for series, step, values in progress_bar(new, unit="line", disable=len(new) < 1000):
        if stop.is_set():
            return
        try:
            send(values, step)
        except Exception as e:              # whatever its package raises
            fail(f"the dashboard takes no more ({type(e).__name__}: {e}): run this again to go on there")
        state["sent"][series], state["lines"] = step, state["lines"] + 1
        if state["lines"] % LINES == 0:
            save()


def send_all(run, send, flush, state, state_path, follow):
    """
    Once or, to follow, until the prior is of all members. state, which is kept in a file: the run's name;
    sent, see unsent(), and how many lines that were.
    """
    def save():
        flush()
        write_json(state_path, state)
    with open(run.path / "metrics.jsonl", "rb") as file, stop_request() as stop:
        while True:
            there = (run.path / "prior.json").exists()      # first: then all lines before it are there, too
            prior = load_prior(run.path) if there else {"members": [], "losses": {}}
            new = list(unsent([*whole_lines(file), *prior_records(prior)], state["sent"]))
            try:
                send_new(new, send, save, state, stop)
            finally:
                if new:
                    save()
            whole = len(prior["members"]) == run.config.trajectories * run.config.cycles
            if not follow or whole or stop.is_set():
                return
            time.sleep(POLL)


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    run = RunDirectory(student_of(config) if options.student else config, data_fingerprint=None)
    if options.to not in BACKENDS:
        fail(f"to='{options.to}': must be one of {', '.join(BACKENDS)}")
    if not (run.path / "metrics.jsonl").exists():
        fail(f"no '{run.path / 'metrics.jsonl'}': run train.py (of a student: distill.py) first")
    module, begin, where = BACKENDS[options.to]
    try:
        backend = importlib.import_module(module)
    except ImportError as e:
        fail(f"to={options.to}: the package '{e.name}' is missing: "
             f"pip install -r '{ROOT / 'requirements-export.txt'}'")
    state_path = run.path / f"log_{options.to}.json"
    name = Path(config.run_dir).resolve().name + ("-student" if options.student else "")
    state = dict(name=f"{name}-{secrets.token_hex(4)}", sent={}, lines=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(run.path / f".log_{options.to}.lock", ""))
        if state_path.exists():
            state = read_json(state_path)
        write_json(state_path, state)       # its name, before there is a run of this name
        before = state["lines"]
        try:
            backend = stack.enter_context(begin(backend, run, options.project, state["name"], before))
        except Exception as e:              # whatever its package raises
            fail(f"to={options.to}: it does not start ({type(e).__name__}: {e}): log in there, or set it up")
        send_all(run, *backend, state, state_path, options.follow)
    where = where.format(path=run.path, project=options.project)
    print0(f"sent {state['lines'] - before:,} lines to {options.to}, as {options.project}/{state['name']}; "
           f"{before:,} were there. See them: {where}")


if __name__ == "__main__":
    main()
