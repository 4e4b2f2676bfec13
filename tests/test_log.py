"""What tools.log sends: every step once, its last line; and what the dashboards then hold."""
import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from infra.files import lock, write_json
from tests.conftest import ROOT
from tools import log

STEPS = [dict(kind="step", trajectory=t, cycle=c, step=2 * c + s, loss=t + c + s / 8, tokens_per_s=10)
         for t in (0, 1) for c in (0, 1) for s in (1, 2)]
SCORES = [dict(kind="score", trajectory=0, cycle=c, val_loss=3.5 + c) for c in (1, 0)]     # of two ranks
LOSSES = dict(best=dict(val=[3.25]), learned=dict(val=[3.25 - K / 8 for K in range(8)]))
PRIOR = dict(members=[{}] * 8, losses=LOSSES)
ALL = {**{(f"trajectory_0{t}/step/loss", step): t + loss for t in (0, 1)
          for step, loss in enumerate((0.125, 0.25, 1.125, 1.25), 1)},
       ("trajectory_00/score/val_loss", 0): 3.5, ("trajectory_00/score/val_loss", 1): 4.5,
       ("prior_of_8/best_val_loss", 1): 3.25,
       **{("prior_of_8/learned_val_loss", K): 3.375 - K / 8 for K in range(1, 9)}}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def sent(monkeypatch, run_dir):
    """[(name, step, value)] of all that a backend in memory was given; with a file `gone` it takes nine."""
    found = []

    @contextlib.contextmanager
    def begin(module, run, project, name, lines):
        def send(values, step):
            if len(found) > 8 and (run_dir / "gone").exists():
                raise RuntimeError("no more")
            found.extend((key, step, value) for key, value in values.items())
        yield send, lambda: None
    def broken(*_):
        raise ValueError("no key")
    backends = dict(memory=("json", begin), broken=("json", broken), absent=("no_such", None))
    for name, backend in backends.items():
        monkeypatch.setitem(log.BACKENDS, name, (*backend, ""))
    return found


def append(run_dir, *records):
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps(record) + "\n" if isinstance(record, dict) else record for record in records)


def finish(run_dir, *records):
    append(run_dir, *records, *SCORES)
    write_json(run_dir / "prior.json", PRIOR)


def once(sent):
    """(name, step) -> value, but for the speed; no two of one step."""
    sent = [row for row in sent if "tokens" not in row[0]]
    found = {(name, step): value for name, step, value in sent}
    assert len(found) == len(sent)
    return found


def test_the_last_line_of_a_step_holds_and_nothing_is_sent_twice(sent, run_dir, micro, refused):
    argv = [*micro(), "--to=memory"]
    append(run_dir, *({**step, "loss": 9.0} for step in STEPS[:2]), *STEPS[:3],
           *(line + "\n" for line in ('{"kind": "step", "traj', "[1]", "2", "null", "{}", "[" * 9999)),
           *({**STEPS[3], "kind": "bad", key: value} for key in ("trajectory", "cycle", "step")
             for value in ("x", None, [1], 0.5, -1)), {**STEPS[0], "loss": 0.125, "note": "x", "norm": None})
    log.main(argv)
    assert [row[1:] for row in sent if row[0].endswith("loss")] == [(1, 0.125), (2, 0.25), (3, 1.125)]
    finish(run_dir, *STEPS[1:])                                 # killed and resumed: step 2 and 3 again
    (run_dir / "gone").touch()
    assert "(RuntimeError: no more)" in refused(log.main, argv)
    assert 3 < len(once(sent)) < len(ALL)                       # it broke off, and goes on there
    (run_dir / "gone").unlink()
    for _ in range(2):
        log.main(argv)
        assert once(sent) == ALL


def test_a_kill_costs_no_run_and_at_most_a_thousand_lines_again(run_dir, micro, monkeypatch):
    (run_dir / "student").mkdir()
    append(run_dir / "student", *({**STEPS[0], "step": step} for step in range(2500)))
    sent, state = [], run_dir / "student" / "log_memory.json"

    @contextlib.contextmanager
    def begin(module, run, project, name, lines):           # with what a kill would leave
        yield lambda values, step: sent.append((name, step, state.read_bytes())), lambda: None
    monkeypatch.setitem(log.BACKENDS, "memory", ("json", begin, ""))
    log.main([*micro(), "--to=memory", "--student"])
    for (name, _, left), first in ((sent[0], 0), (sent[2300], 2000)):
        state.write_bytes(left)
        del sent[:]
        log.main([*micro(), "--to=memory", "--student"])
        assert [row[:2] for row in sent] == [(name, step) for step in range(first, 2500)]
        assert name.startswith("run-student-")


def test_it_follows_until_all_members_are_in_the_prior(sent, run_dir, micro, monkeypatch):
    half, again = json.dumps(STEPS[1]), {**STEPS[0], "loss": 9.0}           # what was sent stays
    events = iter([lambda: append(run_dir, half[:20]),
                   lambda: append(run_dir, half[20:] + "\n", again, *STEPS[2:]),
                   lambda: write_json(run_dir / "prior.json", {"members": [{}], "losses": {}}),
                   lambda: finish(run_dir)])
    monkeypatch.setattr(log.time, "sleep", lambda _: next(events)())
    append(run_dir, STEPS[0])
    log.main([*micro(), "--to=memory", "--follow"])
    assert once(sent) == ALL and next(events, None) is None


def tensorboard_rows(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [folder] = (run_dir / "tensorboard").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def trackio_rows(run_dir):
    database = sqlite3.connect(run_dir / "trackio" / "q0.db")
    rows = database.execute("select run_id, run_name, step, metrics from metrics").fetchall()
    assert len({row[:2] for row in rows}) == 1
    return [(name, step, value) for *_, step, text in rows for name, value in json.loads(text).items()]


def wandb_rows(run_dir):
    """Of the offline runs, which are one: 7 bytes, then each record after 7 bytes with its length."""
    from wandb.proto.wandb_internal_pb2 import Record
    records, files = [], sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1
    for path in files:
        data = path.read_bytes()[7:]
        while data:
            length = 7 + int.from_bytes(data[4:6], "little")
            items, data = Record.FromString(data[7:length]).history.item, data[length:]
            records += [{(*i.nested_key, i.key)[0]: json.loads(i.value_json) for i in items}] if items else []
    assert [values["_step"] for values in records] == list(range(len(records)))     # goes on in the second
    return [(name, values["step"], value) for values in records for name, value in values.items()
            if name != "step" and name[0] != "_"]


@pytest.mark.parametrize("backend, rows", [
    ("tensorboard", tensorboard_rows), ("trackio", trackio_rows), ("wandb", wandb_rows)])
def test_a_dashboard_holds_every_step_once(backend, rows, run_dir, micro):
    pytest.importorskip(backend, reason=f"{backend} is not installed: pip install -r requirements-export.txt")
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(run_dir / "trackio"), "PYTHONPATH": str(ROOT)}
    append(run_dir, *STEPS[:3])
    for there in (lambda: finish(run_dir, *STEPS[2:]), lambda: None):
        subprocess.run([sys.executable, "-m", "tools.log", *micro(), f"--to={backend}"], check=True,
                       cwd=run_dir, env={**os.environ, **own})
        there()
    assert once(rows(run_dir)) == ALL


@pytest.mark.parametrize("args, words", [
    (["--to=wandbb"], "to='wandbb': must be one of wandb, trackio, tensorboard"),
    ([], "to=''"),
    (["--to=memory", "--run_dir=nowhere"], "no 'nowhere/metrics.jsonl': run train.py"),
    (["--to=memory"], "another process"),
    (["--to=absent"], "the package 'no_such' is missing: pip install -r"),
    (["--to=broken"], "to=broken: it does not start (ValueError: no key)"),
])
def test_bad_requests_are_refused(args, words, sent, run_dir, micro, refused):
    append(run_dir, STEPS[0])
    with lock(run_dir / ".log_memory.lock", ""):
        assert words in refused(log.main, [*micro(), *args]) and not sent
