"""
Bad input, one row each: exit code 2, one line that names what is wrong and how to mend it, no traceback, nothing changed
on disk.
"""
import shutil

import pytest

import distill
import prior
import train
from data import prepare
from tests.conftest import MICRO, ROOT, error_line
from tests.test_scripts import tree
from tools import bench, generate, import_slowrun, plan, plot

CONFIG = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished micro population (data, run) and files that are wrong in many ways."""
    folder = tmp_path_factory.mktemp("place")
    argv = arguments(folder)
    for script in (prepare, train, distill, prior):
        script.main(argv)
    for name, content in {"empty.txt": b"", "latin.txt": "na\u00efve".encode("latin-1"), "binary.txt": b"a\0b",
                          "short.txt": b"too short", "table.csv": b"a,b", "rows.jsonl": b'{"txt": 1}\n',
                          "torn.parquet": b"PAR1", "file": b"x", "syntax.py": b"n_layer = = 2",
                          "latin.py": b"# \xe9\xff\nn_layer = 2", "raises.py": b"1 / 0", "partial.py": b"n_layer = 2",
                          "list.py": b"n_layer = [2]", "ranks": b"junk"}.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    return folder


def arguments(folder, **overrides):
    values = {**MICRO, "trajectories": 1, "cycles": 2, "distill_from": 1, "epochs_per_cycle": 0.1,
              "data_dir": folder / "data", "run_dir": folder / "run", **overrides}
    return [CONFIG, *(f"--{k}={v}" for k, v in values.items())]


ROWS = [        # script, what is wrong in its arguments, words that the line must have
    # values
    (train, ["--cylces=3"], ["cylces", "did you mean 'cycles'"]),
    (train, ["--zzz=3"], ["zzz", "config.py"]),
    (train, ["--vocab_size=9"], ["vocab_size", "config.py"]),
    (train, ["--n_layer=3"], ["n_layer=3", "even", "4"]),
    (train, ["--n_embd=33"], ["n_embd=33", "36"]),
    (train, ["--n_embd=16"], ["n_embd=16", "32"]),
    (train, ["--n_head=32"], ["n_head=32", "even width"]),
    (train, ["--dropout=1"], ["dropout=1", "below 1"]),
    (train, ["--dropout=-0.5"], ["dropout=-0.5", "0 or more"]),
    (train, ["--seed=-1"], ["seed=-1"]),
    (train, ["--cycles=0"], ["cycles=0", "more than 0"]),
    (train, ["--cycles=2.5"], ["cycles='2.5'", "whole number"]),
    (train, ["--epochs_per_cycle=nan"], ["epochs_per_cycle=nan"]),
    (train, ["--lr_scale=inf"], ["lr_scale=inf"]),
    (train, ["--n_layer=99999999999999999999"], ["n_layer", "2^31"]),
    (train, ["--tokenizer=words"], ["tokenizer", "bytes, gpt2"]),
    (train, ["--schedule=linear"], ["schedule", "cosine"]),
    (train, ["--restart=anew"], ["restart", "noise, fresh, none"]),
    (train, ["--window_pattern=SX"], ["window_pattern", "SSSL"]),
    (train, ["--batch_tokens=100"], ["batch_tokens=100", "128"]),
    (train, ["--micro_batch=0"], ["micro_batch=0"]),
    (train, ["--loop_extra=1", "--loop_end=1"], ["loop_start", "decoder"]),
    (train, ["--distill_alpha=1.5"], ["distill_alpha", "at most 1"]),
    (train, ["--compile=maybe"], ["compile", "True or False"]),
    (train, ["--resume_every=-1"], ["resume_every=-1"]),
    (train, ["--sequence_len=2"], ["sequence_len=2"]),
    (train, ["--epochs=0"], ["epochs=0", "100,000"]),
    (train, ["--epochs=8"], ["epochs=8", "cycles"]),
    (train, ["--epochs=many"], ["epochs='many'"]),
    (train, ["--run_dir="], ["run_dir"]),
    (train, ["--fitness_tokens=3000"], ["train_tokens=3000", "fitness_tokens"]),
    (train, ["--train_tokens=2000000000"], ["train_tokens", "3000"]),
    (train, ["--ema_decay=0.5", "--run_dir={place}/other"], ["ema_every"]),
    (train, ["--student_from=scratch"], ["student_from", "did you mean"]),
    (train, ["--student"], ["student"]),
    (train, ["--student_teachers=0"], ["student_teachers=0"]),
    (train, ["--ema_share=1.5"], ["ema_share", "at most 1"]),
    (train, ["--momentum_warmup=-1"], ["momentum_warmup=-1"]),
    (distill, ["--student=yes"], ["student='yes'", "True or False"]),
    (distill, ["--student", "--student_alpha=2"], ["student_alpha"]),
    (distill, ["--student", "--student_epochs=0"], ["student_epochs=0"]),
    (distill, ["--student", "--run_dir={place}/other"], ["prior.json", "prior.py"]),
    (prior, ["--student"], ["student' has no members", "--student"]),
    (generate, ["--student"], ["student", "prior.py"]),
    (distill, ["--student", "--student_teachers=4"], ["student_teachers=4", "K = 1, 2"]),
    # flags and config files
    (train, ["--seed"], ["--seed", "VALUE"]),
    (train, [CONFIG], ["one config file"]),
    (train, "none.py", ["none.py", "configs/tiny.py"]),
    (train, "folder", ["folder", "configs/tiny.py"]),
    (train, "syntax.py", ["syntax.py", "SyntaxError"]),
    (train, "latin.py", ["latin.py"]),
    (train, "raises.py", ["raises.py", "ZeroDivisionError"]),
    (train, "partial.py", ["partial.py", "does not set"]),
    (train, "list.py", ["n_layer=[2]", "whole number"]),
    # text, data and run folders
    *((prepare, [f"--data={{place}}/{name}", "--data_dir={place}/new", "--run_dir={place}/new_run"], words) for name, words in (
        ("none.txt", ["none.txt"]),
        ("empty.txt", ["empty.txt", "empty"]),
        ("latin.txt", ["latin.txt", "UTF-8"]),
        ("binary.txt", ["binary.txt", "binary"]),
        ("short.txt", ["too short", "train_tokens"]),
        ("table.csv", ["table.csv", ".jsonl"]),
        ("rows.jsonl", ["rows.jsonl", "row 1", "'text'"]),
        ("torn.parquet", ["torn.parquet"]),
        ("folder", ["folder"]))),
    (prepare, ["--data=,"], ["is empty", ".jsonl"]),
    (prepare, ["--data_dir={place}/file"], ["file"]),
    (train, ["--data_dir={place}/none"], ["none", "data.prepare"]),
    (train, ["--run_dir=/proc/none"], ["run_dir", "/proc/none"]),
    (train, ["--run_dir={place}/file"], ["run_dir"]),
    *((train, [f"--{key}={name}"], ["too long"]) for key in ("run_dir", "data_dir") for name in ("a" * 256, "a/" * 3000)),
    (train, ["--epochs=" + "9" * 5000], ["epochs=", "whole number"]),
    (train, ["--seed=7"], ["seed is 42 there and 7 here", "--run_dir"]),
    (distill, ["--run_dir={place}/other"], ["train.py"]),
    (prior, ["--run_dir={place}/other"], ["no members"]),
    (import_slowrun, ["--snapshots={place}/folder", "--run_dir={place}/other"], ["no model_0.pt"]),
    (import_slowrun, ["--snapshots="], ["snapshots", "a text"]),
    # tools
    (generate, ["--K=3"], ["K=3", "1, 2"]),
    (generate, ["--prompt=\udce9"], ["UTF-8"]),
    (generate, ["--temperature=-1"], ["temperature", "0.001"]),
    (generate, ["--tokens=0"], ["tokens=0"]),
    (generate, ["--top_k=-2"], ["top_k"]),
    (generate, ["--member=9,9"], ["member=9,9", "--member=0,1"]),
    (generate, ["--member=x"], ["member=x"]),
    (generate, ["--K=many"], ["K='many'"]),
    (generate, ["--run_dir={place}/other"], ["prior.py"]),
    (plot, ["--beside={place}/folder"], ["prior.py"]),
    (plan, ["--mfu=2"], ["mfu=2"]),
    (plan, ["--ranks=3"], ["ranks=3"]),
    (bench, ["--steps=fly"], ["steps"]),
    (bench, ["--memory=1"], ["memory=1"]),
    (bench, ["--slowrun={place}/folder", "--steps=train"], ["slowrun", "clone"]),
]


@pytest.mark.parametrize("script, wrong, words", ROWS, ids=[
    f"{script.__name__}-{wrong if isinstance(wrong, str) else ' '.join(wrong)}".encode("ascii", "replace").decode()
    for script, wrong, _ in ROWS])
def test_bad_input(script, wrong, words, place, capsys):
    argv = ([str(place / wrong), *arguments(place)[1:3]] if isinstance(wrong, str) else
            [*arguments(place), *(w.format(place=place) for w in wrong)])
    before = tree(place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    err = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(word in err for word in words), err
    assert tree(place) == before and not {"new", "new_run", "other", "none"} & {p.name for p in place.iterdir()}


@pytest.mark.parametrize("environment, words", [
    (dict(WORLD_SIZE="3"), ["torchrun"]),
    (dict(WORLD_SIZE="many"), ["many", "torchrun"]),
    (dict(RANK="1"), ["RANK", "torchrun"]),
    (dict(RANK="-1"), ["-1"]),
    (dict(WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT="1"), ["3 ranks", "start 2 processes"]),
])
def test_bad_environment(environment, words, place, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = tree(place)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(place))
    err = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(word in err for word in words), err
    assert tree(place) == before


def test_a_damaged_member_is_named_and_the_rest_stays(place, capsys):
    path = place / "run" / "trajectory_00" / "cycle_001.safetensors"
    shutil.copy(path, place / "kept")
    path.write_bytes(path.read_bytes()[:-100])
    before = tree(place)
    with pytest.raises(SystemExit) as stop:
        prior.main(arguments(place))
    assert stop.value.code == 2 and "cycle_001.safetensors" in error_line(capsys.readouterr().err) and tree(place) == before
    (place / "kept").rename(path)
