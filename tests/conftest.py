"""A population small enough to train in a second, for tests that run the scripts."""
import functools
import gc
import json
import os
import re

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the tests are the CPU's: bits, and more ranks than GPUs

import pytest
import torch
from safetensors import safe_open

import distill
import prior
import train
from data import loader, prepare
from infra.config import from_args
from infra.files import read_json, read_tensors, write_json
from infra.run_directory import RunDirectory

ROOT = __import__("pathlib").Path(__file__).resolve().parent.parent
MICRO = dict(n_layer=2, n_embd=32, n_head=2, sequence_len=32, train_tokens=3000, fitness_tokens=1000,
             val_tokens=1800, batch_tokens=128, micro_batch=2, cycles=4, trajectories=2, distill_from=2,
             epochs_per_cycle=0.5, epoch_multiple=4)


def arguments(folder, **overrides):
    """Of a script: configs/tiny.py, made micro, with data and run in this folder."""
    values = {**MICRO, "data_dir": folder / "data", "run_dir": folder / "run", **overrides}
    return [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in values.items())]


def error_line(err):
    """The one error line of a standard error that may hold progress bars (and moves of the cursor)."""
    lines = re.split(r"[\r\n]|\x1b\[A", err)
    [line] = {line for line in lines if line.startswith("error: ")}             # of each rank, perhaps
    assert "Traceback" not in err
    return line


def read(path):
    """(tensors, about) of a file of tensors, of whatever kind."""
    with safe_open(path, "pt") as file:
        return read_tensors(path, json.loads(file.metadata()["about"])["kind"])


def tree(folder):
    """Contents and times of all files in it; a lock is none."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*")
            if p.is_file() and p.name != ".lock"}


def config_of(name, *flags):
    """The Config of configs/NAME.py."""
    return from_args([str(ROOT / "configs" / f"{name}.py"), *flags], "")[0]


def population_of(argv):
    """(config, data, run directory) of a script's arguments."""
    config = from_args(argv, "")[0]
    data = loader.load(config)
    return config, data, RunDirectory(config, data.fingerprint)


def moving(checkpoint):
    """name -> float32 weight, of a checkpoint's tensors."""
    return {name.removeprefix("model."): w for name, w in checkpoint.items() if name.startswith("model.")}


@pytest.fixture(autouse=True, scope="session")
def modules_are_no_garbage():
    """train.py collects before every trajectory: a third of a second for all that the tests import."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def population(tmp_path_factory):
    """(folder, arguments) of 2 x 3 looped members, a prior whose K = 4 has three weights, and a student."""
    folder = tmp_path_factory.mktemp("population")
    argv = arguments(folder, cycles=3, epochs_per_cycle=0.1, student_epochs=0.2, student_teachers=4,
                     loop_start=1, loop_end=2, loop_extra=1)
    for script in (prepare, train, distill, prior):
        script.main(argv)
    result = read_json(folder / "run" / "prior.json")
    answer = next(a for a in result["answers"] if (a["K"], a["rule"]) == (4, "learned"))
    answer |= dict(members=[0, 2, 4, 3], weights=[0.25, 0.6, 0.15, 0.0], val_loss=5.25, val_error=0.0125)
    result["text"]["data"] = str(folder / "data" / "manual")        # a path at home
    write_json(folder / "run" / "prior.json", result)
    for script in (distill, prior):
        script.main([*argv, "--student"])
    return folder, argv


@pytest.fixture
def micro(tmp_path):
    """micro(name=value, ...) -> arguments(), in tmp_path."""
    return functools.partial(arguments, tmp_path)


@pytest.fixture
def ready(micro):
    """micro, its data prepared."""
    prepare.main(micro())
    return micro


@pytest.fixture
def refused(capsys):
    """refused(call, argument, ...) -> the one error line with which the call ends, with exit code 2."""
    def line(call, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*args)
        assert stop.value.code == 2
        return error_line(capsys.readouterr().err)
    return line


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name, what) -> a list that gets what(*args) before every call of owner.name(*args)."""
    def watching(owner, name, what):
        seen, function = [], getattr(owner, name)

        def watched(*args, **kwargs):
            seen.append(what(*args, **kwargs))
            return function(*args, **kwargs)
        monkeypatch.setattr(owner, name, watched)
        return seen
    return watching
