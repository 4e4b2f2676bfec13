"""Killed, stopped, starved, damaged: nothing finished is lost, and what goes on goes on bit for bit."""
import contextlib
import errno
import fcntl
import itertools
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

import distill
import infra.distributed
import infra.files
import infra.run_directory
import prior
import train
from data import loader, prepare
from infra.console import STOPPED, Damaged
from infra.files import FORMAT, lock, read_json, read_tensors, write_json, write_tensors
from tests import soak
from tests.conftest import ROOT, error_line, read, tree
from tools import plot


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder with data, what an uninterrupted run, in folder/whole, leaves)."""
    folder = tmp_path_factory.mktemp("kills")
    prepare.main(soak.small(folder))
    return folder, soak.Run(soak.small(folder), folder / "whole").done()


@pytest.fixture
def run(reference, tmp_path):
    return soak.Run(soak.small(reference[0]), tmp_path / "run", reference[1])


# ------------------------------------------------------------------------------------- killed and stopped

def test_twenty_kills_in_every_phase(reference):
    phases, _, differ = soak.soak(1, 20, reference[0])
    assert phases.total() >= 20 and set(phases) == set(soak.PHASES) and not differ


def meet_no_file():
    """What a library writes to standard output or error of its own."""
    assert {os.fstat(descriptor).st_rdev for descriptor in range(3)} == {os.stat(os.devnull).st_rdev}


def written_to(output):
    """Standard output and error of a process are closed, on a full disk, or of a reader that has gone."""
    def patch(rank):
        if output == "closed":
            for descriptor in range(3):
                os.close(descriptor)
            sys.stdout = sys.stderr = None
            soak.before(train, "train_step", lambda *_: meet_no_file())
        elif output != "a log":
            reader, writer = os.pipe()
            os.close(reader)
            sys.stdout = sys.stderr = open(writer if output == "gone" else "/dev/full", "w")
    return patch


@pytest.mark.parametrize("number, output", [
    (signal.SIGTERM, "a log"), (signal.SIGINT, "gone"), (signal.SIGHUP, "closed"), (signal.SIGUSR1, "full")])
def test_asked_to_stop_it_saves_and_goes_on(number, output, run):
    """By a launcher, Ctrl-C, a closed terminal, SLURM's warning, wherever its output goes."""
    [child] = run.begin("distillation step", "--resume_every=0", patch=written_to(output))
    os.kill(child, number)
    time.sleep(0.01)
    os.kill(child, number)                          # torchrun passes Ctrl-C on: twice, at once, is once
    assert soak.finish([child]) == [STOPPED] and run.saved_last_step()
    assert "Traceback" not in run.said() and ("resume with: " in run.said()) == (output == "a log")
    run.done()


def test_under_nohup_a_closed_terminal_is_nothing(run):
    [child] = run.begin("training step", patch=lambda rank: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(child, signal.SIGHUP)
    assert soak.finish([child]) == [0] and run.differs() == []


def test_asked_twice_it_stops_at_once(run):
    first, second = run.begin("training step", "--micro_batch=1", size=2)
    os.kill(second, signal.SIGSTOP)                 # the first waits for it, deaf to Python's own handlers
    time.sleep(0.5)
    os.kill(first, signal.SIGTERM)
    time.sleep(1.2)
    os.kill(first, signal.SIGTERM)
    codes = soak.finish([first], seconds=20)
    soak.finish([second], seconds=0)
    assert codes == [128 + signal.SIGTERM]


def test_printed_commands_work_where_the_user_stands(run, tmp_path):
    """
    Two ranks of torchrun's are asked to stop; from another folder than the clone's, and with a space in the
    run directory's name, what is printed then is run as it is, and ends where an uninterrupted run does.
    """
    argv = [*run.argv, "--micro_batch=1", "--epochs_per_cycle=2", "--cycles=2"]
    whole, run = (soak.Run(argv, tmp_path / name) for name in ("whole", "my run"))
    assert run.codes(size=2, scripts=(train,)) == [0, 0] and re.search(r"next: .*distill\.py", run.said())
    steps = len(run.steps())
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "distill.py", *run.argv],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(run.steps()) == steps:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)             # the launcher passes it on; its exit code is its own
    command = process.communicate(timeout=60)[0].split("resume with: ")[1].splitlines()[0]
    assert process.returncode == 1 and run.saved_last_step() and not list(run.folder.rglob("cycle_001*"))
    for script in ("distill.py", "prior.py", "-m tools.plot"):
        assert script in command and ("--nproc_per_node=2" in command) == (".py" in script)
        done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=tmp_path, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        command = done.stdout.split("next: ")[-1].strip()
    run.whole = whole.done(size=2)
    assert run.differs() == [] and (run.folder / "prior.png").exists()


def test_ranks_of_a_group_leave_at_one_step_and_sum_as_before(run):
    flags = ["--micro_batch=1", "--batch_tokens=192"]
    run.whole = soak.Run([*run.argv, *flags], run.folder.parent / "whole").done(size=3)
    run.stop("distillation step", *flags, size=3)
    run.done(*flags, size=3)


def test_groups_that_are_asked_together_leave_together(run):
    """Whether they are in the middle of a step or wait for the others at the end."""
    children = run.start("--trajectories=2", size=2, patch=lambda rank: rank and soak.before(
        train, "seed_dropout", lambda *_: time.sleep(0.5)))         # the second is slow
    while not (run.folder / "trajectory_00" / "cycle_000.safetensors").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert soak.finish(children, 30) == [STOPPED] * 2 and "error" not in run.said(), run.said()[-2000:]


def test_other_ranks_and_micro_batches_take_the_same_tokens(run, tmp_path):
    """From one rank to two and back: every step has the tokens of an uninterrupted run, once."""
    tokens = tmp_path / "tokens"
    def watch(rank):
        def note(batches, n):
            with tokens.open("a") as f:
                f.write(f"{n} sequences from {batches.position}\n")
        if rank == 0:
            soak.before(loader.Batches, "take", note)
    assert run.codes(f"--run_dir={tmp_path / 'whole'}", patch=watch) == [0]
    wanted = tokens.read_text()
    tokens.unlink()
    for cycles, size, most in (("training", 1, 4), ("distillation", 2, 1), ("distillation", 2, 2)):
        run.stop(f"{cycles} step", f"--micro_batch={most}", size=size, patch=watch)
    assert run.codes("--micro_batch=1", patch=watch) == [0]
    assert tokens.read_text() == wanted and len(wanted.splitlines()) == len(run.whole["steps"])
    assert "ranks is 1 there and 2 here" in run.said() and "not bit for bit" in run.said()


# ------------------------------------------------------------------------------------------------ faults

def no_room_for(file, room=350):
    """Files of this name end at so many bytes, as on a full disk; where one has them, there is room again."""
    def patch(rank):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        for owner, name in ((infra.files, "write_whole"), (infra.run_directory, "append_json")):
            def limited(path, content, write=getattr(owner, name)):
                full = path.name == file and not (path.exists() and path.stat().st_size == room)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room if full else most, most))
                try:
                    write(path, content)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            setattr(owner, name, limited)
    return patch


@pytest.mark.parametrize("file, room", [
    *((file, 350) for file in ("config.json", "metrics.jsonl", "cycle_000.safetensors", "resume.safetensors",
                               "00_000.safetensors", "prior.json")), ("metrics.jsonl", 0)])
def test_a_full_disk(file, room, run):
    """What was there stays, and the run goes on once there is room."""
    assert run.codes(patch=no_room_for(file, room)) == [2], run.said()
    err = error_line(run.said())
    assert f"{file}'" in err and "make room" in err and not list(run.folder.rglob(".writing-*")), err
    run.done()


def test_room_is_looked_for_before_the_first_step(run, monkeypatch, refused):
    usage = shutil.disk_usage(run.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert "make room" in refused(train.main, run.argv) and not list(run.folder.rglob("*.safetensors"))


def test_a_file_system_without_locks_and_flushed_folders(run):
    """Files are flushed all the same, before they get their names."""
    flushed = set()
    def flush(descriptor):
        if stat.S_ISDIR((of := os.fstat(descriptor)).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed.add(of.st_ino)
    def lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    def rename(path, _):
        assert os.stat(path).st_ino in flushed
    def poor(rank):
        for owner, name, do in ((os, "fsync", flush), (fcntl, "flock", lock), (os, "replace", rename)):
            soak.before(owner, name, do)
    run.done(patch=poor)


def cut(content):
    return content[:len(content) // 2]


def flipped(content, bit):
    """A copy of bytes with one bit turned."""
    return content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:]


def test_no_flipped_bit_passes(reference, tmp_path):
    """Of a member and a state: a bit flipped anywhere is found, or changes nothing that is read."""
    passed = 0
    for name in ("cycle_001.safetensors", "resume.safetensors"):
        path = reference[0] / "whole" / "trajectory_00" / name
        content, (tensors, about) = path.read_bytes(), read(path)
        for end in 75 * [len(content), 4000]:           # anywhere, and in the names and shapes at the front
            (tmp_path / name).write_bytes(flipped(content, soak.RANDOM.randrange(8 * end)))
            with contextlib.suppress(Damaged):
                theirs, passed = read_tensors(tmp_path / name, about["kind"]), passed + 1
                assert theirs[1] == about and theirs[0].keys() == tensors.keys()
                assert all(torch.equal(w, theirs[0][n]) for n, w in tensors.items())
    assert passed < 100


@pytest.mark.parametrize("damage", [cut, lambda b: flipped(b, 4 * len(b)), lambda b: b"", bytes])
def test_a_damaged_checkpoint_is_passed_over(damage, run):
    """And only a whole one (bytes: no damage) takes the previous one's place, should the next write fail."""
    run.stop("distillation step")
    newest, previous = (run.folder / "trajectory_00" / f"resume{of}.safetensors" for of in ("", "_previous"))
    kept = (newest if damage is bytes else previous).read_bytes()
    newest.write_bytes(damage(newest.read_bytes()))
    assert run.codes(patch=no_room_for(newest.name)) == [2] and previous.read_bytes() == kept
    assert bool(re.search(f"'{newest}' is .*trying the previous one", run.said())) == (damage is not bytes)
    run.done()


def content(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def copied(other):
    return lambda path: shutil.copy(path.parent / other, path)


def rewritten(identity=(), **said):
    """Whole, but it says something else of itself."""
    def rewrite(path):
        tensors, about = (None, read_json(path)) if path.suffix == ".json" else read(path)
        about |= {**said, "identity": {**about.get("identity", {}), **dict(identity)}}
        if tensors is None:
            return write_json(path, about)
        write_tensors(path, about.pop("kind"), tensors, **about)
    return rewrite


FIT, VAL, CYCLE_0 = "scores/fit/00_001.safetensors", "scores/val/00_001.safetensors", "cycle_000.safetensors"
MEMBER, STATE = "trajectory_00/cycle_001.safetensors", "trajectory_00/resume.safetensors"
READ_BY = {FIT: prior, VAL: prior, MEMBER: prior, STATE: distill, "config.json": train, "prior.json": plot}
UNUSABLE = [        # file, what happens to it, words of the line
    *((file, content(what), "' is ") for file in READ_BY for what in (cut, lambda b: b"", lambda b: b"[1]")),
    *((file, rewritten(format=FORMAT + 1), "' is damaged, or of another version") for file in READ_BY),
    *((file, copied(other), "' holds something else") for file, other in (
        (FIT, f"../../{VAL}"), (FIT, f"../../{MEMBER}"), (MEMBER, f"../{FIT}"), ("config.json", "prior.json"),
        (MEMBER, CYCLE_0), (STATE, CYCLE_0), ("prior.json", "config.json"))),
    *((file, rewritten({key: value}), f"' is of another population ({key} is {value} there")
      for file, key, value in ((MEMBER, "tokenizer", "gpt2"), (MEMBER, "fitness_tokens", 999),
                               (MEMBER, "data_fingerprint", "0" * 64), (STATE, "lr_scale", 7.0))),
    (STATE, os.unlink, "' has members but no checkpoint to resume from: restore one, or delete '")]


@pytest.mark.parametrize("file, change, words", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named(file, change, words, run, reference, refused):
    shutil.copytree(reference[0] / "whole", run.folder)
    for path in run.folder.glob(file.replace("resume", "resume*")):         # the previous one, too
        change(path)
    before = tree(run.folder)
    named = file if (run.folder / file).exists() else "trajectory_00"
    assert named + words in refused(READ_BY[file].main, run.argv) and tree(run.folder) == before


@pytest.mark.parametrize("owner, name, call, words", [
    (train, "label_loss", 5, "step 2, sequences up to 11 of its order: loss nan"),
    (torch.nn.utils, "clip_grad_norm_", 3, r"step 2, .*: loss \d+\.\d+, gradient norm nan"),
    (loader, "score", 1, "fitness loss nan")])
def test_nothing_is_kept_of_what_is_no_number(owner, name, call, words, run):
    """It stops and names the step; without the cause it goes on as if nothing had been."""
    def poison(rank):
        function, calls = getattr(owner, name), itertools.count(1)
        setattr(owner, name, lambda *args: function(*args) * (math.nan if next(calls) == call else 1))
    assert run.codes(patch=poison) == [1] and re.search(words, error_line(run.said()))
    assert not list(run.folder.glob("trajectory_00/cycle_*"))
    run.done()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others(fault, run):
    def impatient(rank):
        infra.distributed.GROUP_TIMEOUT = infra.distributed.timedelta(seconds=5)
    first, second = run.begin("training step", "--micro_batch=1", size=2, patch=impatient)
    os.kill(second, fault)
    codes = soak.finish([first], seconds=60)
    soak.finish([second], seconds=0)
    assert codes == [1], run.said()[-2000:]
    assert "another rank exited or hangs" in error_line(run.said())
    assert run.codes("--micro_batch=1", size=2) == [0, 0]
    assert run.steps().keys() == run.whole["steps"].keys()


def test_a_second_run_on_one_directory_is_refused(run, tmp_path):
    first = run.begin("training step")
    os.kill(first[0], signal.SIGSTOP)
    codes = run.codes(size=2)
    os.kill(first[0], signal.SIGCONT)
    assert codes[0] == 2 and "another process writes to" in run.said()
    assert soak.finish(first) == [0] and run.differs() == []


@pytest.mark.parametrize("script", [train, prior])
def test_a_rank_that_sees_another_disk_is_refused(script, run, reference, tmp_path):
    for disk in "01":                               # copies, not the same one
        shutil.copytree(reference[0] / "whole", tmp_path / disk / "run")
        shutil.rmtree(tmp_path / disk / "run" / "scores")
    def apart(rank):
        infra.run_directory.LAG = 0
        os.chdir(tmp_path / str(rank))
    before = tree(tmp_path)
    assert run.codes("--run_dir=run", size=2, patch=apart, scripts=(script,))[1] == 2
    assert re.search("rank 1,.*does not see rank 0's disk", error_line(run.said()))
    assert {**tree(tmp_path), run.log: None} == {**before, run.log: None}


def test_ranks_that_found_different_checkpoints_are_refused(run):
    run.stop("training step", "--micro_batch=1", size=2)
    def behind(rank):
        of = infra.run_directory.RunDirectory.load_checkpoint
        def earlier(self, t):
            tensors, at = of(self, t)
            return tensors, {**at, "step": at["step"] - rank}
        infra.run_directory.RunDirectory.load_checkpoint = earlier
    assert run.codes("--micro_batch=1", size=2, patch=behind)[0] == 2
    assert "different checkpoints of trajectory 0" in error_line(run.said())


def test_prior_runs_beside_training(run, reference):
    """Which has the lock, and brings a member while the others are scored: one for the next time."""
    shutil.copytree(reference[0] / "whole", run.folder, ignore=shutil.ignore_patterns("scores", "prior.json"))
    member = run.folder / "trajectory_00" / "cycle_002.safetensors"
    late = member.rename(run.folder / "late")
    def comes(*_):
        if late.exists():
            late.rename(member)
    with lock(run.folder / ".lock", "of training"):
        assert run.codes(patch=lambda rank: soak.before(loader, "score", comes), scripts=(prior,)) == [0]
    assert "2 of 3 members" in run.said() and member.exists()
    run.done()
