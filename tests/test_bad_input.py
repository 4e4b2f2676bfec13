"""
Bad input, one row each: exit code 2, one line that names what is wrong and how to mend it, no traceback,
nothing changed on disk. tests/test_config.py has the rules of the settings.
"""
import pytest

import distill
import prior
import train
from data import prepare
from tests.conftest import ROOT, tree
from tools import bench, generate, import_slowrun, plan, plot

CONFIG = str(ROOT / "configs" / "tiny.py")
CONFIGS = {         # name: content, words that the line must have
    "none.py": (None, ["none.py", "configs/tiny.py"]),
    "folder": (None, ["folder", "configs/tiny.py"]),
    "syntax.py": (b"n_layer = = 2", ["syntax.py", "SyntaxError"]),
    "latin.py": (b"# \xe9\xff\nn_layer = 2", ["latin.py"]),
    "raises.py": (b"1 / 0", ["raises.py", "ZeroDivisionError"]),
    "partial.py": (b"n_layer = 2", ["partial.py", "does not set", "n_head"]),
    "list.py": (b"n_layer = [2]", ["n_layer=[2]", "whole number"]),
    "text.py": (b"n_layer = '4'", ["text.py", "does not set"]),
    "bool.py": (b"cycles = True", ["cycles=True", "whole number"]),
    "typo.py": (b"n_layers = 2", ["n_layers", "did you mean 'n_layer'?"]),
}
TEXTS = {
    "none.txt": (None, ["none.txt"]),
    "folder": (None, ["folder"]),
    "empty.txt": (b"", ["empty.txt", "empty"]),
    "latin.txt": (b"na\xefve", ["latin.txt", "UTF-8"]),
    "binary.txt": (b"a\0b", ["binary.txt", "binary"]),
    "short.txt": (b"too short", ["too short", "train_tokens"]),
    "table.csv": (b"a,b", ["table.csv", ".jsonl"]),
    "rows.jsonl": (b'{"txt": 1}\n', ["rows.jsonl", "row 1", "'text'"]),
    "torn.parquet": (b"PAR1", ["torn.parquet"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with files that are wrong in many ways."""
    folder = tmp_path_factory.mktemp("place")
    for name, (content, _) in {**CONFIGS, **TEXTS, "file": (b"x", [])}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    return folder


ROWS = [        # script, what is wrong in its arguments, words that the line must have
    (train, ["--epochs=" + "9" * 5000], ["epochs=", "whole number"]),
    (train, ["--train_tokens=2000000000"], ["train_tokens", "3000"]),
    (train, ["--ema_decay=0.5", "--run_dir={place}/other"], ["ema_every"]),
    (train, ["--student"], ["student"]),
    (distill, ["--student", "--run_dir={place}/other"], ["prior.json", "prior.py"]),
    (prior, ["--student", "--run_dir={place}/other"], ["student' has no members", "--student"]),
    (generate, ["--student", "--run_dir={place}/other"], ["student", "prior.py"]),
    # config files, text, data and run folders
    (train, [CONFIG], ["one config file"]),
    *((train, name, words) for name, (_, words) in CONFIGS.items()),
    *((prepare, [f"--data={{place}}/{name}", "--data_dir={place}/new", "--run_dir={place}/new_run"], words)
      for name, (_, words) in TEXTS.items()),
    (prepare, ["--data=,"], ["is empty", ".jsonl"]),
    (prepare, ["--data_dir={place}/file"], ["file"]),
    (train, ["--data_dir={place}/none"], ["none", "data.prepare"]),
    (train, ["--run_dir=/proc/none"], ["run_dir", "/proc/none"]),
    (train, ["--run_dir={place}/file"], ["run_dir"]),
    *((train, [f"--{key}={name}"], ["too long"])
      for key in ("run_dir", "data_dir") for name in ("a" * 256, "a/" * 3000)),
    (distill, ["--run_dir={place}/other"], ["train.py"]),
    (prior, ["--run_dir={place}/other"], ["no members"]),
    (import_slowrun, ["--snapshots={place}/folder", "--run_dir={place}/other"], ["no model_0.pt"]),
    (import_slowrun, ["--snapshots="], ["snapshots", "a text"]),
    # tools
    (generate, ["--K=3"], ["K=3", "1, 2"]),
    (generate, ["--prompt=\udce9"], ["UTF-8"]),
    (generate, ["--temperature=-1"], ["temperature", "0.001"]),
    (generate, ["--member=9,9"], ["member=9,9", "--member=1,2"]),
    (generate, ["--K=many"], ["K='many'"]),
    *((generate, [f"--{flag}"], [flag]) for flag in (
        "tokens=0", "top_k=-2", "member=x", "member=0,²", "K=3000", "temperature=nan", "sample_seed=-1",
        "sample_seed=9223372036854775808")),
    (generate, ["--run_dir={place}/other"], ["prior.py"]),
    (plot, ["--beside={place}/folder"], ["prior.py"]),
    (plan, ["--mfu=2"], ["mfu=2"]),
    (plan, ["--price=-1"], ["price=-1"]),
    (plan, ["--ranks=3"], ["ranks=3", "--ranks=2"]),
    (plan, ["--ranks=-1"], ["ranks=-1"]),
    (bench, ["--steps=fly"], ["steps"]),
    (bench, ["--memory=1"], ["memory=1"]),
    (bench, ["--slowrun={place}/folder", "--steps=train"], ["slowrun", "clone"]),
]


@pytest.mark.parametrize("script, wrong, words", ROWS,
                         ids=lambda value: getattr(value, "__name__", ascii(value)[:60]))
def test_bad_input(script, wrong, words, place, population, refused):
    folder, argv = population
    if isinstance(wrong, str):                                          # a config file
        argv = [str(place / wrong), *argv[1:3]]
    else:
        argv = [*argv, *(flag.format(place=place) for flag in wrong)]
    before = tree(place), tree(folder)
    line = refused(script.main, argv)
    assert all(word in line for word in words), line
    assert (tree(place), tree(folder)) == before
    assert not {"new", "new_run", "other", "none"} & {p.name for p in place.iterdir()}


@pytest.mark.parametrize("environment, words", [
    (dict(WORLD_SIZE="3"), ["torchrun"]),
    (dict(WORLD_SIZE="many"), ["many", "torchrun"]),
    (dict(RANK="1"), ["RANK", "torchrun"]),
    (dict(RANK="-1"), ["-1"]),
    (dict(WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1"),
     ["3 ranks for a trajectory", "start 2 processes"]),
])
def test_bad_environment(environment, words, population, monkeypatch, refused):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = tree(population[0])
    line = refused(train.main, population[1])
    assert all(word in line for word in words) and tree(population[0]) == before, line
