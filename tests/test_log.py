"""What tools.log sends: every step once, its last line; and what the dashboards then hold."""
import contextlib
import json
import os
import sqlite3
import struct
import subprocess
import sys

import pytest

from infra.files import lock, write_json
from tests.conftest import ROOT, error_line
from tools import log

STEPS = [dict(kind="step", trajectory=t, cycle=c, step=2 * c + s, loss=t + c + s / 8, tokens_per_s=10)
         for t in (0, 1) for c in (0, 1) for s in (1, 2)]
SCORES = [dict(kind="score", trajectory=0, cycle=c, val_loss=3.5 + c) for c in (1, 0)]     # of two ranks
LOSSES = dict(best=dict(val=[3.25]), learned=dict(val=[3.25 - K / 8 for K in range(8)]))
PRIOR = dict(members=[{}] * 8, losses=LOSSES)
ALL = {("trajectory_00/step/loss", 1): 0.125, ("trajectory_00/step/loss", 2): 0.25,
       ("trajectory_00/step/loss", 3): 1.125, ("trajectory_00/step/loss", 4): 1.25,
       ("trajectory_01/step/loss", 1): 1.125, ("trajectory_01/step/loss", 2): 1.25,
       ("trajectory_01/step/loss", 3): 2.125, ("trajectory_01/step/loss", 4): 2.25,
       ("trajectory_00/score/val_loss", 0): 3.5, ("trajectory_00/score/val_loss", 1): 4.5,
       ("prior_of_8/best_val_loss", 1): 3.25,
       **{("prior_of_8/learned_val_loss", K): 3.375 - K / 8 for K in range(1, 9)}}


@pytest.fixture
def sent(monkeypatch):
    """[(name, step, value)] of all that a backend in memory was given."""
    found = []

    @contextlib.contextmanager
    def begin(module, run, project, name, lines):
        yield lambda values, step: found.extend((key, step, value) for key, value in values.items())
    monkeypatch.setitem(log.BACKENDS, "memory", ("json", begin))
    return found


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def append(run_dir, *records):
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps(record) + "\n" if isinstance(record, dict) else record for record in records)


def once(sent):
    """(name, step) -> value, but for the speed; no two of one step."""
    sent = [row for row in sent if "tokens" not in row[0]]
    found = {(name, step): value for name, step, value in sent}
    assert len(found) == len(sent)
    return found


def test_the_last_line_of_a_step_holds_and_nothing_is_sent_twice(sent, run_dir, micro):
    argv = [*micro(), "--to=memory"]
    append(run_dir, *({**step, "loss": 9.0} for step in STEPS[:2]), *STEPS[:3], '{"kind": "step", "traj\n')
    log.main(argv)
    assert [row[1:] for row in sent if row[0].endswith("loss")] == [(1, 0.125), (2, 0.25), (3, 1.125)]
    append(run_dir, *STEPS[1:], *SCORES)                        # killed and resumed: step 2 and 3 again
    write_json(run_dir / "prior.json", PRIOR)
    for _ in range(2):
        log.main(argv)
        assert once(sent) == ALL


def test_one_that_breaks_off_goes_on_there(sent, run_dir, micro, monkeypatch):
    append(run_dir, *STEPS, *SCORES)
    write_json(run_dir / "prior.json", PRIOR)
    name, begin = log.BACKENDS["memory"]

    @contextlib.contextmanager
    def breaks_off(*args):
        with begin(*args) as send:
            def send_some(values, step):
                if len(sent) > 8:
                    raise ZeroDivisionError
                send(values, step)
            yield send_some
    monkeypatch.setitem(log.BACKENDS, "memory", (name, breaks_off))
    with pytest.raises(ZeroDivisionError):
        log.main([*micro(), "--to=memory"])
    assert 0 < len(once(sent)) < len(ALL)
    monkeypatch.setitem(log.BACKENDS, "memory", (name, begin))
    log.main([*micro(), "--to=memory"])
    assert once(sent) == ALL


def test_two_do_not_send_one_run(sent, run_dir, micro, capsys):
    append(run_dir, *STEPS)
    with lock(run_dir / ".log_memory.lock", ""), pytest.raises(SystemExit) as stop:
        log.main([*micro(), "--to=memory"])
    assert stop.value.code == 2 and "another process" in error_line(capsys.readouterr().err) and not sent


def test_it_follows_until_all_members_are_in_the_prior(sent, run_dir, micro, monkeypatch):
    half = json.dumps(STEPS[1])
    again = {**STEPS[0], "loss": 9.0}                           # was sent: that stays
    events = iter([lambda: append(run_dir, half[:20]),
                   lambda: append(run_dir, half[20:] + "\n", again, *STEPS[2:], *SCORES[:1]),
                   lambda: write_json(run_dir / "prior.json", {"members": [{}], "losses": {}}),
                   lambda: append(run_dir, SCORES[1]),
                   lambda: write_json(run_dir / "prior.json", PRIOR)])
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
    return [(name, step, value) for _, _, step, text in rows for name, value in json.loads(text).items()]


def wandb_rows(run_dir):
    """Of the offline runs, which are one: Record after Record in blocks of 32 KiB, as LevelDB logs."""
    from wandb.proto.wandb_internal_pb2 import Record
    rows, steps = [], []
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1
    for path in files:
        data, at, payload = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 2 ** 15 - at % 2 ** 15 < 7:
                at += 2 ** 15 - at % 2 ** 15
                continue
            _, length, part = struct.unpack_from("<IHB", data, at)
            payload += data[at + 7:at + 7 + length]
            at += 7 + length
            if part in (1, 4):                                  # the whole of a record, or its end
                items, payload = Record.FromString(payload).history.item, b""
                values = {i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in items}
                if values:
                    steps.append(values.pop("_step"))
                    step = values.pop("step")
                    rows += [(name, step, value) for name, value in values.items() if name[0] != "_"]
    assert steps == list(range(len(steps)))                     # its own step goes on in the second file
    return rows


@pytest.mark.parametrize("backend, rows", [
    ("tensorboard", tensorboard_rows), ("trackio", trackio_rows), ("wandb", wandb_rows)])
def test_a_dashboard_holds_every_step_once(backend, rows, run_dir, micro):
    pytest.importorskip(backend, reason=f"{backend} is not installed: pip install -r requirements-export.txt")
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(run_dir / "trackio"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.log", *micro(), f"--to={backend}"]
    append(run_dir, *STEPS[:3])
    subprocess.run(command, check=True, cwd=run_dir, env={**os.environ, **own})
    append(run_dir, *STEPS[2:], *SCORES)
    write_json(run_dir / "prior.json", PRIOR)
    subprocess.run(command, check=True, cwd=run_dir, env={**os.environ, **own})
    assert once(rows(run_dir)) == ALL


@pytest.mark.parametrize("args, names", [
    (["--to=wandbb"], ["wandbb", "wandb, trackio, tensorboard"]),
    ([], ["to=''"]),
    (["--to=memory", "--run_dir=nowhere"], ["nowhere/metrics.jsonl", "train.py"]),
    (["--to=gone"], ["'no_such_package'", "pip install -r"]),
    (["--to=broken"], ["to=broken", "no key"]),
])
def test_bad_requests_are_refused(args, names, sent, run_dir, micro, monkeypatch, capsys):
    monkeypatch.setitem(log.BACKENDS, "gone", ("no_such_package", None))
    def broken(*_):
        raise ValueError("no key")
    monkeypatch.setitem(log.BACKENDS, "broken", ("json", broken))
    append(run_dir, STEPS[0])
    with pytest.raises(SystemExit) as stop:
        log.main([*micro(), *args])
    line = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(name in line for name in names), line
