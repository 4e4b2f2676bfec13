"""Disks that fill, readers that go, any terminal: real processes, stopped, and resumed bit for bit."""
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from infra.console import STOPPED
from tests import kill
from tests.conftest import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = ["--epochs_per_cycle=3", "--cycles=2", "--distill_from=1", "--resume_every=0"]       # 50 steps a cycle


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(arguments, what an uninterrupted run leaves)."""
    folder = tmp_path_factory.mktemp("output")
    kill.prepare(folder)
    argv = [*kill.arguments(folder), *LONG]
    return argv, kill.uninterrupted(argv, folder / "whole")


def start(argv, run_dir, shell="{}", **environment):
    """train.py in a process group of its own, as part of a line of the shell's."""
    command = f"exec {shlex.join([sys.executable, str(ROOT / 'train.py'), *argv, f'--run_dir={run_dir}'])}"
    return subprocess.Popen(
        ["bash", "-c", shell.format(command)], start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**ENVIRONMENT, **environment})


def begin(argv, run_dir, shell="{}"):
    """The process, some steps on."""
    process, log = start(argv, run_dir, shell), run_dir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("shell", ["{} > /dev/full 2>&1", "{} 0<&- >&- 2>&-", "{}"])
def test_output_that_cannot_be_written_costs_nothing(shell, reference, tmp_path):
    """A full disk, closed descriptors, a `| tee` that Ctrl-C ends first: the step at hand is saved."""
    argv, whole = reference
    run_dir, log, process = tmp_path / "run", tmp_path / "log", begin(argv, tmp_path / "run", shell)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == STOPPED and kill.saved_last_step(run_dir)
    assert not list(run_dir.glob("trajectory_00/cycle_*"))              # it was inside the first cycle
    assert kill.finish(kill.start([*argv, f"--run_dir={run_dir}"], log)) == [0], log.read_text()[-2000:]
    assert kill.difference(whole, run_dir) == []


@pytest.mark.parametrize("environment", [dict(PYTHONIOENCODING="ascii"),
                                         dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_any_encoding_of_the_terminal_will_do(environment, reference, tmp_path):
    argv = [*reference[0], "--cycles=1", "--epochs_per_cycle=0.1"]
    process = start(argv, tmp_path / "\u4e16\u754c", **environment)
    out = process.communicate(timeout=60)[0].decode("latin-1")
    assert process.returncode == 0 and "next: " in out and "Traceback" not in out, out


def test_printed_commands_work_where_the_user_stands(reference, tmp_path):
    """From another folder, with a space in the run directory's name: what is printed is run as it is."""
    process = begin(reference[0], tmp_path / "my run", f"cd {tmp_path}; {{}}")
    process.send_signal(signal.SIGTERM)
    command = process.communicate(timeout=60)[0].decode().split("resume with: ")[1].splitlines()[0]
    for script in ("train.py", "distill.py", "prior.py", "-m tools.plot"):
        assert script in command
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                              timeout=100, env=ENVIRONMENT)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        command = done.stdout.split("next: ")[-1].strip()
    assert kill.difference(reference[1], tmp_path / "my run") == []
    assert (tmp_path / "my run" / "prior.png").exists()
