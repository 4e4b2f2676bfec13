"""
Terminals that close, disks that fill, readers that go: real processes, asked to stop and resumed, and what they leave
compared with an uninterrupted run, bit for bit.
"""
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from infra.console import STOPPED
from tests import kill
from tests.conftest import ROOT, read

LONG = ["--epochs_per_cycle=3", "--cycles=2", "--distill_from=1", "--resume_every=0"]        # about 50 steps a cycle


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder with data, arguments, what an uninterrupted run leaves)."""
    folder = tmp_path_factory.mktemp("output")
    kill.prepare(folder)
    argv = [*kill.arguments(folder), *LONG]
    return folder, argv, kill.uninterrupted(argv, folder / "whole")


def start(argv, run_dir, redirect="", before="", **environment):
    """train.py in a process group of its own, its output as the shell's `redirect` says."""
    command = f"{before} exec {sys.executable} {ROOT}/train.py {shlex.join(argv)} --run_dir={run_dir} {redirect}"
    return subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment})


def begun(run_dir, process, steps=3):
    until = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0].decode()
        time.sleep(0.01)


def resumes(reference, run_dir):
    """It was stopped inside the first cycle with a checkpoint of its last step; the rest gives what the whole run gave."""
    folder, argv, whole = reference
    step = read(run_dir / "trajectory_00" / "resume.safetensors")[1]["step"]
    assert step == max(r["step"] for r in kill.logged(run_dir)) and not (run_dir / "trajectory_00" / "cycle_000.safetensors").exists()
    assert kill.finish(kill.start([*argv, f"--run_dir={run_dir}"], run_dir / "log")) == [0], (run_dir / "log").read_text()[-2000:]
    (run_dir / "log").unlink()
    assert kill.difference(whole, run_dir) == []


@pytest.mark.parametrize("redirect", ["> /dev/full 2>&1", "0<&- >&- 2>&-"])
def test_output_that_cannot_be_written_costs_nothing(redirect, reference, tmp_path):
    """A full disk, closed descriptors: asked to stop, the step at hand is saved all the same."""
    run_dir = tmp_path / "run"
    process = start(reference[1], run_dir, redirect)
    begun(run_dir, process)
    os.killpg(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == STOPPED and "Traceback" not in out and "Exception" not in out, out
    resumes(reference, run_dir)


def test_ctrl_c_that_ends_the_reader_first(reference, tmp_path):
    """./run.sh | tee log, Ctrl-C: tee ends before train.py prints its next line."""
    run_dir = tmp_path / "run"
    process = start(reference[1], run_dir)
    begun(run_dir, process)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == STOPPED
    resumes(reference, run_dir)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_slurms_warning_are_saved(number, reference, tmp_path):
    run_dir = tmp_path / "run"
    process = start(reference[1], run_dir)
    begun(run_dir, process)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == STOPPED and "resume with: " in out
    resumes(reference, run_dir)


def test_nohup_goes_on(reference, tmp_path):
    folder, argv, whole = reference
    run_dir = tmp_path / "run"
    process = start(argv, run_dir, before="trap '' HUP;")
    begun(run_dir, process)
    process.send_signal(signal.SIGHUP)
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 0 and "next: " in out, out
    assert (run_dir / "trajectory_00" / "cycle_000.safetensors").read_bytes() == whole["trajectory_00/cycle_000.safetensors"]


@pytest.mark.parametrize("environment", [dict(PYTHONIOENCODING="ascii"),
                                         dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_any_encoding_of_the_terminal_will_do(environment, reference, tmp_path):
    run_dir = tmp_path / "\u4e16\u754c"
    process = start([*reference[1], "--cycles=1", "--epochs_per_cycle=0.1"], run_dir, **environment)
    out = process.communicate(timeout=60)[0].decode("latin-1")
    assert process.returncode == 0 and "next: " in out and "Traceback" not in out, out


def test_a_file_system_without_fsync_of_folders_and_locks(reference, tmp_path):
    folder, argv, whole = reference
    def poor(rank):
        import errno
        import fcntl
        import stat
        fsync = os.fsync
        def no_folders(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(descriptor)
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        os.fsync, fcntl.flock = no_folders, no_locks
    argv = [*argv, f"--run_dir={tmp_path / 'run'}"]
    assert kill.finish(kill.start(argv, tmp_path / "log", patch=poor)) == [0], (tmp_path / "log").read_text()[-2000:]
    assert kill.difference(whole, tmp_path / "run") == []


def test_printed_commands_work_where_the_user_stands(reference, tmp_path):
    """From another folder, with a space in the run directory's name: what is printed is run as it is."""
    folder, argv, whole = reference
    run_dir, command = tmp_path / "my run", None
    process = start(argv, shlex.quote(str(run_dir)), before=f"cd {tmp_path};")
    begun(run_dir, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0].decode()
    command = out.split("resume with: ")[1].splitlines()[0]
    for script in ("train.py", "distill.py", "prior.py", "-m tools.plot"):
        assert script in command
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        command = done.stdout.split("next: ")[-1].strip()
    assert kill.difference(whole, run_dir) == [] and (run_dir / "prior.png").exists()
