"""
A run on a dashboard: python -m tools.log CONFIG --to=wandb [--name=value ...]
Sends the lines of run_dir/metrics.jsonl, and prior.json's losses for every K, to wandb, trackio or
tensorboard: those that are there or, with --follow, all until the population is finished. Called again it
goes on where it stopped (run_dir/log_wandb.json; without that file it begins a new run). Training knows
nothing of it. After a kill some steps come again: the last line of a step holds, but what was sent stays.

Of its own: --to=wandb, trackio or tensorboard (each its own package)    --project=q0    --follow    --student
"""
import contextlib
import importlib
import itertools
import json
import secrets
import time

from infra.config import from_args, student_of
from infra.console import ROOT, fail, print0, progress_bar, script
from infra.distributed import stop_request
from infra.files import lock, read_json, write_json
from infra.run_directory import RunDirectory, load_prior

OPTIONS = dict(to="", project="q0", follow=False, student=False)

POLL = 2                    # seconds


# -------------------------------------------------------------------------------------------- where it goes

@contextlib.contextmanager
def to_wandb(wandb, run, project, name, lines):
    # its own step must never go back, but ours do, with every trajectory: they are a value and the x-axis
    settings = wandb.Settings(console="off", x_disable_stats=True)
    with wandb.init(project=project, id=name, name=name, resume="allow", dir=run.path, config=run.identity,
                    settings=settings) as there:
        there.define_metric("*", step_metric="step")
        count = itertools.count(lines)
        yield lambda values, step: there.log({**values, "step": step}, step=next(count))


@contextlib.contextmanager
def to_trackio(trackio, run, project, name, lines):
    there = trackio.init(project=project, name=name, resume="allow", config=run.identity, auto_log_cpu=False,
                         auto_log_gpu=False)
    yield there.log
    there.finish()


@contextlib.contextmanager
def to_tensorboard(tensorboard, run, project, name, lines):
    with tensorboard.SummaryWriter(run.path / "tensorboard" / name) as there:
        def send(values, step):
            for key, value in values.items():
                there.add_scalar(key, value, step)
        yield send


BACKENDS = {"wandb": ("wandb", to_wandb), "trackio": ("trackio", to_trackio),
            "tensorboard": ("torch.utils.tensorboard", to_tensorboard)}


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


def send_new(new, send, state, stop):
    """Send what unsent() gives, and note it in state, until all is sent or it is asked to stop."""
    for series, step, values in progress_bar(new, unit="line", disable=len(new) < 1000):
        if stop.is_set():
            return
        try:
            send(values, step)
        except Exception as e:              # whatever its package raises
            fail(f"the dashboard takes no more ({type(e).__name__}: {e}): run this again to go on there")
        state["sent"][series], state["lines"] = step, state["lines"] + 1


def send_all(run, send, state, state_path, follow):
    """
    Once or, to follow, until the prior is of all members. state, which is kept in a file: sent, see unsent(),
    and how many lines that were.
    """
    with open(run.path / "metrics.jsonl", "rb") as file, stop_request() as stop:
        while True:
            there = (run.path / "prior.json").exists()      # first: then all lines before it are there, too
            prior = load_prior(run.path) if there else {"members": [], "losses": {}}
            new = list(unsent([*whole_lines(file), *prior_records(prior)], state["sent"]))
            try:
                send_new(new, send, state, stop)
            finally:
                if new:
                    write_json(state_path, state)
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
    module, begin = BACKENDS[options.to]
    try:
        backend = importlib.import_module(module)
    except ImportError as e:
        fail(f"to={options.to}: the package '{e.name}' is missing: "
             f"pip install -r '{ROOT / 'requirements-export.txt'}'")
    state_path = run.path / f"log_{options.to}.json"
    state = dict(name=f"{run.path.resolve().name}-{secrets.token_hex(4)}", sent={}, lines=0)
    if state_path.exists():
        state = read_json(state_path)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(run.path / f".log_{options.to}.lock", ""))
            send = stack.enter_context(begin(backend, run, options.project, state["name"], state["lines"]))
        except Exception as e:              # whatever its package raises
            fail(f"to={options.to}: it does not start ({type(e).__name__}: {e}): log in there, or set it up")
        before = state["lines"]
        send_all(run, send, state, state_path, options.follow)
    print0(f"sent {state['lines'] - before:,} lines to {options.to}, as {options.project}/{state['name']}; "
           f"{before:,} were there")


if __name__ == "__main__":
    main()
