"""Killed, stopped, starved, damaged: nothing finished is lost, and what goes on goes on bit for bit."""
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import distill
import prior
import train
from infra.config import from_args
from data import loader
import infra.files
import infra.distributed
import infra.run_directory
from infra.console import STOPPED, Damaged
from infra.files import read_json, read_tensors, write_json, write_tensors
from infra.run_directory import RunDirectory
from tests import kill
from tools import plot
from tests.conftest import ROOT, error_line, read


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder with data, files of an uninterrupted run in folder/whole)."""
    folder = tmp_path_factory.mktemp("kills")
    kill.prepare(folder)
    return folder, kill.uninterrupted(kill.arguments(folder), folder / "whole")


@pytest.fixture
def begun(reference, tmp_path):
    """(argv of a run of its own, its folder, its log, the files it should end with)."""
    folder, whole = reference
    return [*kill.arguments(folder), f"--run_dir={tmp_path / 'run'}"], tmp_path / "run", tmp_path / "log", whole


def finishes(begun, size=1):
    """It goes on to the end, and leaves what an uninterrupted run leaves."""
    argv, folder, log, whole = begun
    assert kill.finish(kill.start(argv, log, size)) == [0] * size, log.read_text()[-2000:]
    assert kill.difference(whole, folder) == []


# ------------------------------------------------------------------------------------- killed and stopped

def test_twenty_kills_at_random_moments(begun):
    argv, folder, log, whole = begun
    kills, phases = 0, set()
    while kills < 20:
        children = kill.start(argv, log)
        moment = kill.within(kill.RANDOM.choice(kill.PHASES), children, kill.RANDOM.uniform(0, 0.02))
        phase = kill.kill_when(children, moment)
        if phase is None:                           # it ended first: compare, begin anew
            assert kill.difference(whole, folder) == []
            shutil.rmtree(folder)
        else:
            kills, phases = kills + 1, phases | {phase}
    finishes(begun)
    assert len(phases) > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(number, begun):
    argv, folder, log, _ = begun
    [child] = kill.start(argv, log)
    assert kill.within("distillation step", [child], 0)(), log.read_text()[-3000:]
    os.kill(child, number)
    os.kill(child, number)                          # torchrun passes Ctrl-C on: twice, at once, is once
    assert kill.finish([child]) == [STOPPED]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (read(folder / "trajectory_00" / "resume.safetensors")[1]["step"] == steps[-1]
            and re.search(r"resume with: \S*python\S* \S*distill.py", log.read_text()) and "Traceback" not in log.read_text())
    finishes(begun)


def test_asked_twice_it_stops_at_once(begun):
    argv, folder, log, _ = begun
    children = kill.start([*argv, "--micro_batch=1"], log, size=2)
    assert kill.within("training step", children, 0)(), log.read_text()[-3000:]
    os.kill(children[1], signal.SIGSTOP)            # so that the first waits for it, deaf to Python's own handlers
    time.sleep(0.5)
    os.kill(children[0], signal.SIGTERM)
    time.sleep(1.2)
    os.kill(children[0], signal.SIGTERM)
    assert kill.finish(children[:1], seconds=20) == [128 + signal.SIGTERM]
    os.kill(children[1], signal.SIGKILL)
    kill.finish(children[1:])


def test_no_request_to_stop_is_lost(begun):
    """One that comes while the ranks agree on the last step counts at the next."""
    argv, folder, log, _ = begun
    def ask_then(rank):
        mean = infra.distributed.Ranks.mean
        def asking(self, *values):
            if len(calls := asking.__dict__.setdefault("calls", [])) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            calls.append(1)
            return mean(self, *values)
        infra.distributed.Ranks.mean = asking
    assert kill.finish(kill.start(argv, log, patch=ask_then)) == [STOPPED]
    assert "after step 3 " in log.read_text()
    finishes(begun)


def test_torchrun_is_asked_to_stop(begun):
    """The launcher passes it on; what it prints itself and its exit code are its own."""
    argv, folder, log, whole = begun
    with open(log, "wb") as out:
        launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                     str(ROOT / "train.py"), *argv, "--micro_batch=1", "--epochs_per_cycle=30"],
                                    stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while launcher.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 1 and "resume with: " in log.read_text() and "--nproc_per_node=2 train.py" in log.read_text()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert read(folder / "trajectory_00" / "resume.safetensors")[1]["step"] == steps[-1] and steps == list(range(1, len(steps) + 1))


def test_three_ranks_sum_as_before_after_a_stop(begun):
    argv, folder, log, _ = begun
    argv = [*argv, "--micro_batch=1", "--batch_tokens=192"]
    whole = kill.uninterrupted(argv, folder.parent / "whole", size=3)
    children = kill.start(argv, log, size=3)
    assert kill.within("distillation step", children, 0)(), log.read_text()[-3000:]
    os.kill(children[0], signal.SIGTERM)
    assert kill.finish(children) == [STOPPED] * 3
    assert kill.finish(kill.start(argv, log, size=3)) == [0] * 3 and kill.difference(whole, folder) == []


def test_all_ranks_of_a_group_leave_at_the_same_step(begun):
    argv, folder, log, whole = begun
    argv = [*argv, "--micro_batch=1"]
    children = kill.start(argv, log, size=2)
    assert kill.within("training step", children, 0)(), log.read_text()[-3000:]
    os.kill(children[1], signal.SIGTERM)
    assert kill.finish(children) == [STOPPED] * 2, log.read_text()[-3000:]
    assert kill.finish(kill.start(argv, log, 2)) == [0, 0] and kill.debris(folder) == []
    assert [s[:2] for s in kill.left(folder)["steps"]] == [s[:2] for s in whole["steps"]]


def test_other_ranks_and_micro_batches_take_the_same_tokens(begun, tmp_path):
    """Begun on one rank, gone on with on two, and back: every step has the tokens of an uninterrupted run, once."""
    argv, folder, log, _ = begun
    def watch(rank):
        take = loader.Batches.take
        def watched(self, n):
            rows = take(self, n)
            if rank == 0:
                with open(tmp_path / "tokens", "a") as f:
                    f.write(hashlib.sha256(rows.numpy()).hexdigest() + "\n")
            return rows
        loader.Batches.take = watched
    assert kill.finish(kill.start([*argv, f"--run_dir={tmp_path / 'whole'}"], log, patch=watch)) == [0]
    wanted = (tmp_path / "tokens").read_text()
    (tmp_path / "tokens").unlink()
    for phase, size, micro_batch in (("training step", 1, 4), ("distillation step", 2, 1), ("distillation step", 2, 2),
                                     ("fit", 1, 1)):
        children = kill.start([*argv, f"--micro_batch={micro_batch}"], log, size, patch=watch)
        if phase == "fit":
            assert kill.finish(children) == [0]
        else:
            assert kill.within(phase, children, 0)(), log.read_text()[-3000:]
            os.kill(children[0], signal.SIGTERM)
            assert kill.finish(children) == [STOPPED] * size, log.read_text()[-2000:]
    assert (tmp_path / "tokens").read_text() == wanted and len(wanted.splitlines()) == len(set(wanted.splitlines()))
    assert "ranks is 1 there and 2 here" in log.read_text() and "not bit for bit" in log.read_text()


# ------------------------------------------------------------------------------------------------ faults

def limit(size):
    return lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("file, scripts, size", [
    ("config.json", kill.SCRIPTS, 100),
    ("metrics.jsonl", kill.SCRIPTS, 3_000_000),
    ("cycle_000.safetensors", kill.SCRIPTS, 20_000),
    ("resume.safetensors", kill.SCRIPTS, 200_000),
    ("00_000.safetensors", (prior,), 1000),
    ("prior.json", (prior,), 2000),
])
def test_a_full_disk(file, scripts, size, begun, reference):
    """
    A limit on the size of files, in bytes, stops each kind of file; what was there stays, and the run goes on once there is
    room.
    """
    argv, folder, log, whole = begun
    if scripts == (prior,):
        shutil.copytree(reference[0] / "whole", folder,
                        ignore=shutil.ignore_patterns("prior.json", *["scores"] * (file != "prior.json")))
    if file == "metrics.jsonl":
        folder.mkdir()
        (folder / file).write_text('{"kind": "score", "trajectory": 0}\n' * (size // 35))
    metrics = (folder / "metrics.jsonl").read_bytes() if scripts == (prior,) else b""
    if metrics:
        (folder / "metrics.jsonl").write_bytes(b"")
    limited = [*argv, "--resume_every=0"] if "cycle" in file else argv                  # a state is larger than a member
    assert kill.finish(kill.start(limited, log, patch=limit(size), scripts=scripts)) == [2], log.read_text()
    if metrics:
        (folder / "metrics.jsonl").write_bytes(metrics)
    err = error_line(log.read_text())
    assert f"{file}'" in err and "make room" in err and not list(folder.rglob(".writing-*")), err
    finishes(begun)


def flipped(content, n):
    """A copy of bytes with their n-th bit turned."""
    return content[:n // 8] + bytes([content[n // 8] ^ 1 << n % 8]) + content[n // 8 + 1:]


def test_no_flipped_bit_passes(reference, tmp_path):
    """Of a member and a state: a bit flipped anywhere is found, or changes nothing that is read."""
    found = 0
    for path in ("cycle_001.safetensors", "resume.safetensors"):
        content = (reference[0] / "whole" / "trajectory_00" / path).read_bytes()
        tensors, about = read(reference[0] / "whole" / "trajectory_00" / path)
        for _ in range(150):
            (tmp_path / path).write_bytes(flipped(content, kill.RANDOM.randrange(8 * len(content))))
            try:
                theirs, their_about = read_tensors(tmp_path / path, about["kind"])
            except Damaged:
                found += 1
                continue
            assert (their_about == about and theirs.keys() == tensors.keys()
                    and all(torch.equal(w, theirs[n]) for n, w in tensors.items()))
    assert found > 200


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: flipped(b, 4 * len(b)), lambda b: b""])
def test_a_damaged_state_is_passed_over(damage, begun, reference):
    argv, folder, log, _ = begun
    [child] = kill.start(argv, log)
    assert kill.within("distillation step", [child], 0)(), log.read_text()[-3000:]
    os.kill(child, signal.SIGTERM)
    kill.finish([child])
    _, newest = sorted((folder / "trajectory_00").glob("resume*"), reverse=True)         # never more than two
    newest.write_bytes(damage(newest.read_bytes()))
    finishes(begun)
    assert f"'{newest}' " in log.read_text() and "trying the previous one" in log.read_text()


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(begun, reference):
    """The newest is damaged, and the write of the next fails: the previous one is still there to resume from."""
    argv, folder, log, _ = begun
    [child] = kill.start(argv, log)
    assert kill.within("distillation step", [child], 0)(), log.read_text()[-3000:]
    os.kill(child, signal.SIGTERM)
    kill.finish([child])
    newest, previous = (folder / "trajectory_00" / f"resume{name}.safetensors" for name in ("", "_previous"))
    kept = previous.read_bytes()
    newest.write_bytes(flipped(newest.read_bytes(), 80_000))
    assert kill.finish(kill.start(argv, log, patch=limit(200_000))) == [2] and previous.read_bytes() == kept
    finishes(begun)


@pytest.mark.parametrize("copied, over, script", [
    ("scores/val/00_001.safetensors", "scores/fit/00_001.safetensors", prior),
    ("trajectory_00/cycle_001.safetensors", "scores/fit/00_001.safetensors", prior),
    ("scores/val/00_001.safetensors", "trajectory_00/cycle_001.safetensors", prior),
    ("trajectory_00/cycle_000.safetensors", "trajectory_00/cycle_001.safetensors", prior),
    ("trajectory_00/cycle_000.safetensors", "trajectory_00/resume.safetensors", distill),
    ("prior.json", "config.json", train),
    ("config.json", "prior.json", plot),
])
def test_a_file_of_another_kind_is_named(copied, over, script, begun, reference, capsys):
    argv, folder, _, _ = begun
    shutil.copytree(reference[0] / "whole", folder)
    (folder / "trajectory_00" / "resume_previous.safetensors").unlink()
    shutil.copy(folder / copied, folder / over)
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 2 and f"{folder / over}' holds something else" in error_line(capsys.readouterr().err)


def test_groups_that_are_asked_together_leave_together(begun):
    """Whether they are in the middle of a step or wait for the others at the end."""
    argv, folder, log, _ = begun
    children = kill.start([*argv, "--trajectories=2"], log, 2, lambda rank: rank and setattr(
        train, "seed_dropout", lambda *_: time.sleep(0.5)))         # the second is slow
    while not (folder / "trajectory_00" / "cycle_000.safetensors").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert kill.finish(children, 30) == [STOPPED] * 2, log.read_text()[-2000:]
    assert "error" not in log.read_text()


def test_no_whole_state_is_refused(begun, reference, capsys):
    argv, folder, log, _ = begun
    shutil.copytree(reference[0] / "whole", folder)
    for path in folder.glob("trajectory_00/resume*"):
        path.write_bytes(path.read_bytes()[:-7])
    for name in ("resume", "resume_previous"):
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
        assert (stop.value.code == 2 and f"delete '{folder}/trajectory_00'" in (err := error_line(capsys.readouterr().err))
                and f"{name}.safetensors" in err)
        (folder / "trajectory_00" / f"{name}.safetensors").unlink()
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "has members but no checkpoint" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("split", ["fit", "val"])
def test_flipped_scores_and_results_are_named(split, begun, reference, capsys):
    argv, folder, _, _ = begun
    shutil.copytree(reference[0] / "whole", folder)
    path = folder / "scores" / split / "00_001.safetensors"
    numbers, kept = read(path)[0]["log_p"].numpy().tobytes(), path.read_bytes()
    for at in (kept.index(numbers) + 40, kept.index(b"weights_sha256") + 20):
        path.write_bytes(flipped(kept, 8 * at))
        with pytest.raises(SystemExit) as stop:
            prior.main(argv)
        path.write_bytes(kept)
        assert stop.value.code == 2 and "00_001.safetensors' is damaged" in error_line(capsys.readouterr().err)
    (folder / "prior.json").write_bytes((folder / "prior.json").read_bytes().replace(b'"K": 1', b'"K": 2', 1))
    with pytest.raises(Damaged, match="prior.json' is damaged"):
        infra.run_directory.load_prior(folder)


def test_flipped_data_is_refused(reference, tmp_path, capsys):
    shutil.copytree(reference[0] / "data", tmp_path / "data")
    argv = [*kill.arguments(tmp_path), f"--run_dir={tmp_path / 'run'}"]
    path = tmp_path / "data" / "text_train.pt"
    file = torch.load(path)
    file["tokens"].view(torch.uint8)[100] ^= 1
    torch.save(file, path)
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2 and "data.prepare" in error_line(capsys.readouterr().err) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_is_kept_of_a_step_that_is_no_number(what, begun):
    """
    The fifth step's loss or gradient is no number: it stops, names the step, and without the cause goes on as if nothing
    had been.
    """
    argv, folder, log, _ = begun
    def poison(rank):
        real, calls = train.label_loss, []
        class Infinite(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()
            @staticmethod
            def backward(ctx, g):
                return g * float("inf")
        def loss(model, batch):
            calls.append(1)
            good = real(model, batch)
            return good if len(calls) != 5 else good * float("nan") if what == "loss" else Infinite.apply(good)
        train.label_loss = loss
    assert kill.finish(kill.start(argv, log, patch=poison)) == [1]
    assert ("step 2," in (err := error_line(log.read_text())) and "sequences up to 11" in err
            and ("nan" in err or "inf" in err)), err
    finishes(begun)


def test_a_member_that_is_no_number_is_not_kept(begun):
    argv, folder, log, _ = begun
    def poison(rank):
        score = loader.score
        loader.score = lambda *args: score(*args) * float("nan")
    assert kill.finish(kill.start(argv, log, patch=poison)) == [1]
    assert "fitness loss nan" in error_line(log.read_text()) and not list(folder.glob("trajectory_00/cycle_*"))
    finishes(begun)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others(fault, begun):
    argv, folder, log, whole = begun
    argv = [*argv, "--micro_batch=1"]
    def impatient(rank):
        infra.distributed.GROUP_TIMEOUT = infra.distributed.timedelta(seconds=5)
    children = kill.start(argv, log, 2, patch=impatient)
    assert kill.within("training step", children, 0)(), log.read_text()[-3000:]
    os.kill(children[1], fault)
    assert kill.finish(children[:1], seconds=60) == [1], log.read_text()[-2000:]
    os.kill(children[1], signal.SIGKILL)
    kill.finish(children[1:])
    assert "another rank exited or hangs" in error_line(log.read_text())
    assert kill.finish(kill.start(argv, log, 2)) == [0, 0] and kill.debris(folder) == []
    assert [s[:2] for s in kill.left(folder)["steps"]] == [s[:2] for s in whole["steps"]]


def test_a_second_run_on_one_directory_is_refused(begun, tmp_path):
    argv, folder, log, whole = begun
    for name, size in (("second", 1), ("third", 2)):
        first = kill.start(argv, log)
        assert kill.within("training step", first, 0)(), log.read_text()[-3000:]
        os.kill(first[0], signal.SIGSTOP)
        assert kill.finish(kill.start(argv, tmp_path / name, size))[0] == 2
        assert "another process writes to" in error_line((tmp_path / name).read_text())
        os.kill(first[0], signal.SIGCONT)
        assert kill.finish(first) == [0] and kill.difference(whole, folder) == []
        shutil.rmtree(folder)


@pytest.mark.parametrize("script", [train, prior])
def test_a_rank_that_sees_another_disk_is_refused(script, begun, reference, tmp_path):
    argv, folder, log, whole = begun
    for disk in "01":                               # copies, not the same one
        shutil.copytree(reference[0] / "whole", tmp_path / disk / "run", ignore=shutil.ignore_patterns("scores"))
    def apart(rank):
        infra.run_directory.LAG = 0
        os.chdir(tmp_path / str(rank))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*t")}
    assert kill.finish(kill.start([*argv, "--run_dir=run"], log, 2, apart, scripts=(script,)))[1] == 2
    assert "rank 1" in (err := error_line(log.read_text())) and "does not see rank 0's disk" in err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.*t")}


@pytest.mark.parametrize("file", ["trajectory_00/cycle_001.safetensors", "trajectory_00/resume.safetensors", "config.json",
                                  "prior.json", "scores/fit/00_001.safetensors"])
def test_files_of_a_newer_version(file, begun, reference, monkeypatch, capsys):
    argv, folder, _, _ = begun
    shutil.copytree(reference[0] / "whole", folder)
    newer, ours = infra.files.FORMAT + 1, infra.files.FORMAT
    path = folder / file
    tensors, about = (None, read_json(path)) if path.suffix == ".json" else read(path)
    monkeypatch.setattr(infra.files, "FORMAT", newer)
    if path.suffix == ".json":
        write_json(path, {k: v for k, v in about.items() if k not in ("format", "kind")})
    else:
        write_tensors(path, about["kind"], {n: w.clone() for n, w in tensors.items()},
                     **{k: v for k, v in about.items() if k not in ("format", "kind", "sha256")})
        for other in set(folder.glob("trajectory_00/resume*")) - {path}:
            other.unlink()
    monkeypatch.setattr(infra.files, "FORMAT", ours)
    from tools import plot
    script = train if "resume" in file else plot if file == "prior.json" else prior
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 2 and "another version" in error_line(capsys.readouterr().err)


# --------------------------------------------------------------------------------------------- disk, strangers

def test_a_member_that_comes_while_others_are_scored(begun, reference):
    argv, folder, log, whole = begun
    shutil.copytree(reference[0] / "whole", folder, ignore=shutil.ignore_patterns("scores", "prior.json"))
    late = (folder / "trajectory_00" / "cycle_002.safetensors").rename(folder / "late")
    def comes(rank):
        score = loader.score
        def scoring(*args):
            if (folder / "late").exists():
                (folder / "late").rename(folder / "trajectory_00" / "cycle_002.safetensors")
            return score(*args)
        loader.score = scoring
    assert kill.finish(kill.start(argv, log, patch=comes, scripts=(prior,))) == [0], log.read_text()[-2000:]
    assert "2 of 3 members" in log.read_text() and not late.exists()
    finishes(begun)


def test_prior_may_run_beside_training(begun):
    argv, folder, log, whole = begun
    first = kill.start(argv, log)
    assert kill.within("distillation step", first, 0)(), log.read_text()[-3000:]
    assert kill.finish(kill.start(argv, log, scripts=(prior,))) == [0] and "of 3 members" in log.read_text()
    assert kill.finish(first) == [0] and kill.difference(whole, folder) == []


def test_room_is_looked_for_before_the_first_step(begun, monkeypatch, capsys):
    argv, folder, _, _ = begun
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2 and "make room" in error_line(capsys.readouterr().err) and not list(folder.rglob("*.safetensors"))


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/q0_was_run",)


@pytest.mark.parametrize("tensors", [
    {"w": Code()},
    {"w": torch.zeros(1).expand(10 ** 12)},
    {"w": torch.zeros(4).to_sparse()},
    {"w": torch.zeros(4, device="meta")},
    {"w": [1]},
    {1: torch.zeros(1)},
    [torch.zeros(1)],
    None,
])
def test_a_strangers_tensors(tensors, tmp_path, reference, capsys):
    torch.save({"tensors": tensors}, tmp_path / "member.safetensors")
    with pytest.raises(Damaged):
        read_tensors(tmp_path / "member.safetensors", "the member of cycle 0")
    (tmp_path / "data").mkdir()
    torch.save({"tokens": torch.zeros(1700, dtype=torch.uint16),
                "doc_starts": tensors["w"] if isinstance(tensors, dict) and "w" in tensors else tensors, "bos_id": 256},
               tmp_path / "data" / "text_train.pt")
    shutil.copy(reference[0] / "data" / "text_val.pt", tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        train.main([*kill.arguments(tmp_path), f"--run_dir={tmp_path / 'run'}"])
    assert stop.value.code == 2 and "text_train.pt" in error_line(capsys.readouterr().err)
    assert not os.path.exists("/tmp/q0_was_run")


def test_the_resume_state_is_the_populations(begun, reference, capsys):
    """A state of another population under this name is not gone on from."""
    argv, folder, _, _ = begun
    shutil.copytree(reference[0] / "whole", folder)
    config = from_args(argv, "")[0]
    run = RunDirectory(config, loader.load(config).fingerprint)
    tensors, about = run.load_checkpoint(0)
    run.identity = {**run.identity, "lr_scale": 7.0}
    for _ in range(2):
        run.save_checkpoint(0, {n: w.clone() for n, w in tensors.items()}, step=about["step"], environment=about["environment"])
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "lr_scale is 7.0 there" in error_line(capsys.readouterr().err.replace("note: ", ""))
