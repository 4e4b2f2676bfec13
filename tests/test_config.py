"""Config files and the command line: what is read, what is refused; every knob is read and used somewhere."""
import dataclasses
import re

import pytest

from infra.config import FIELDS, Config, from_args
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.py")
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def refused(argv, capsys):
    """The one line on standard error of a refused command line."""
    with pytest.raises(SystemExit) as stop:
        from_args(argv, "usage")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_overrides_are_typed_and_the_last_one_wins():
    config = from_args([TINY, "--cycles=3", "--lr_scale=1", "--compile=true", "--cycles=5", "--data=a.txt,b"], "")[0]
    assert (config.cycles, config.lr_scale, config.compile, config.data) == (5, 1.0, True, "a.txt,b")
    assert type(config.lr_scale) is float


def test_what_follows_from_other_values():
    config = from_args([TINY, "--tokenizer=gpt2", "--batch_tokens=2048"], "")[0]
    assert (config.vocab_size, config.batch_tokens_ends) == (50257, 2048)
    assert from_args([TINY, "--batch_tokens_ends=512"], "")[0].batch_tokens_ends == 512


@pytest.mark.parametrize("args, names", [
    (["--cylces=3"], ["cylces", "did you mean 'cycles'"]),
    (["--cycles=three"], ["cycles", "whole number"]),
    (["--cycles=0"], ["cycles", "more than 0"]),
    (["--cycles=1.5"], ["cycles"]),
    (["--n_layer=3"], ["n_layer", "even"]),
    (["--n_embd=130"], ["n_embd", "n_head=4"]),
    (["--n_head=128"], ["n_head", "even width"]),
    (["--batch_tokens=1000"], ["batch_tokens", "sequence_len=128", "1024"]),
    (["--batch_tokens_ends=100"], ["batch_tokens_ends"]),
    (["--tokenizer=words"], ["tokenizer", "bytes"]),
    (["--schedule=step"], ["schedule"]),
    (["--window_pattern=SX"], ["window_pattern"]),
    (["--dropout=1"], ["dropout"]),
    (["--dropout=-0.1"], ["dropout"]),
    (["--distill_alpha=1.5"], ["distill_alpha"]),
    (["--lr_scale=nan"], ["lr_scale"]),
    (["--lr_scale=inf"], ["lr_scale"]),
    (["--compile=maybe"], ["compile"]),
    (["--run_dir="], ["run_dir"]),
    (["--cycles"], ["--cycles", "VALUE"]),
    (["--loop_extra=2"], ["loop_start"]),
    (["--fitness_tokens=100"], ["fitness_tokens"]),
    (["--train_tokens=10000"], ["train_tokens"]),
    (["extra.py"], ["one config file"]),
    (["--seed=-1"], ["seed"]),
    (["--n_embd=16"], ["n_embd", "32"]),
    (["--restart=anew"], ["restart", "noise, fresh, none"]),
    (["--loop_from=1"], ["loop_from", "below 1"]),
    (["--ema_decay=1"], ["ema_decay"]),
    (["--ema_every=0"], ["ema_every"]),
    (["--first_cycle_epochs=-1"], ["first_cycle_epochs"]),
    (["--seed=99999999999999999999"], ["seed", "2^31"]),
    (["--epochs_per_cycle=1e308"], ["epochs_per_cycle", "2^31"]),
])
def test_bad_values_are_refused_by_name(args, names, capsys):
    err = refused([TINY, *args], capsys)
    assert all(name in err for name in names), err


@pytest.mark.parametrize("epochs, trajectories, cycles, spent", [
    (8, 1, 4, 8),
    (56, 1, 28, 56),
    (128, 1, 64, 128),
    (129, 2, 32, 128),
    (256, 2, 64, 256),
    (257, 3, 42, 252),
    (512, 3, 85, 510),
    (513, 4, 64, 512),
    (1024, 4, 128, 1024),
    (1025, 5, 102, 1020),
])
def test_a_budget_becomes_a_population(epochs, trajectories, cycles, spent):
    config = from_args([TINY, f"--epochs={epochs}"], "")[0]
    assert (config.trajectories, config.cycles, config.epochs_per_cycle, config.restart) == (trajectories, cycles, 2, "noise")
    assert config.trajectories * config.epochs_until(config.cycles) == spent


@pytest.mark.parametrize("epochs, first, gap", [(1, 0.8875, 0.0375), (2, 1.25, 0.25), (4, 3.25, 0.25), (7, 6.25, 0.25)])
def test_a_small_budget_is_one_decay_with_snapshots_at_its_end(epochs, first, gap):
    config = from_args([TINY, f"--epochs={epochs}"], "")[0]
    assert (config.trajectories, config.cycles, config.restart, config.distill_from) == (1, 4, "none", 4)
    assert ([config.cycle_epochs(c) for c in range(4)] == pytest.approx([first, gap, gap, gap])
            and config.epochs_until(4) == pytest.approx(epochs))
    assert config.batch_tokens_ends == config.batch_tokens


@pytest.mark.parametrize("args, names", [
    (["--epochs=0"], ["epochs", "from 1"]),
    (["--epochs=-8"], ["epochs"]),
    (["--epochs=1.5"], ["epochs", "whole number"]),
    (["--epochs="], ["epochs"]),
    (["--epochs"], ["--epochs=VALUE"]),
    (["--epochs=16", "--cycles=8"], ["epochs", "cycles"]),
    (["--trajectories=2", "--epochs=16"], ["trajectories"]),
    (["--epochs=4", "--restart=noise"], ["restart"]),
    (["--epochs=16", "--restart=none"], ["restart"]),
    (["--epochs=16", "--first_cycle_epochs=100"], ["first_cycle_epochs"]),
    (["--epochs=100001"], ["100,000"]),
    (["--epochs=16", "--schedule=cosine"], ["schedule"]),
    (["--restart=none", "--ema_decay=0.9"], ["ema_decay", "restart=none"]),
])
def test_budgets_that_are_refused(args, names, capsys):
    err = refused([TINY, *args], capsys)
    assert all(name in err for name in names), err


def test_the_first_rank_of_a_machine_prints_before_the_others(monkeypatch, capsys):
    """torchrun ends all ranks with the first that ends: of the same line one is seen."""
    waits = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    for local, waited in (("0", []), ("1", [(5, "")])):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as stop:
            from_args([TINY, "--cylces=3"], "usage")
        assert stop.value.code == 2 and waits == waited and "cylces" in capsys.readouterr().err


def test_bad_config_files_are_refused(tmp_path, capsys):
    assert "one config file" in refused([], capsys)
    assert "missing.py" in refused([str(tmp_path / "missing.py")], capsys)
    bad = tmp_path / "bad.py"
    for content, names in (("n_layers = 4", ["n_layers", "n_layer"]), ("n_layer = ", ["SyntaxError"]),
                           ("n_layer = '4'", ["does not set"]), ("n_layer = 4", ["does not set", "n_head"]),
                           ("cycles = True", ["cycles"]), ("1 / 0", ["ZeroDivisionError"])):
        bad.write_text(content)
        err = refused([str(bad)], capsys)
        assert all(name in err for name in names), err
    bad.write_bytes(b"\xff\xfe\x00")
    refused([str(bad)], capsys)


def test_what_a_config_imports_or_defines_is_no_setting(tmp_path):
    """As in nanoGPT's: an import, a function, a class, its own path."""
    config = tmp_path / "mine.py"
    config.write_text("import os\nfrom math import pi\ndef half(n):\n    return n // 2\nclass Shape: pass\n_twice = 2\n"
                      "assert os.path.exists(__file__)\n"
                      + (ROOT / "configs" / "tiny.py").read_text() + "\nn_layer = half(8) * _twice\ndel pi\n")
    assert from_args([str(config)], "")[0].n_layer == 8


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = from_args([TINY, "--run_dir=~/x", "--data_dir=~/d"], "")[0]
    assert (config.run_dir, config.data_dir) == ("/home/someone/x", "/home/someone/d")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    config = from_args([str(path)], "")[0]
    assert config.run_dir == f"runs/{path.stem}"


RECORD = dict(              # slowrun.md, written out once more
    data="fineweb", tokenizer="gpt2", train_tokens=100_000_000, val_tokens=10_000_000, fitness_tokens=132_000,
    epoch_multiple=16, n_layer=30, n_head=16, n_embd=2048, sequence_len=2048, window_pattern="SSSL", iha=True, dropout=0.1,
    mtp_weight=0.3,
    loop_start=15, loop_end=25, loop_extra=4, loop_from=0, restart="noise", schedule="cycle", ema_decay=0, ema_share=1,
    momentum_warmup=0, lr_scale=0.25, batch_tokens=524_288, batch_tokens_ends=393_216, seed=42,
    epochs_per_cycle=2, first_cycle_epochs=0, distill_from=8, distill_alpha=0.45,
    distill_temperature=1.2, trajectories=5, cycles=96)


@pytest.mark.parametrize("name, other", [
    ("1p8b_960", {}),
    ("1p8b", dict(trajectories=2, cycles=64)),
    ("baseline", dict(trajectories=8, cycles=1, epochs_per_cycle=32, schedule="cosine", loop_from=0.5, distill_from=1,
                      batch_tokens_ends=524_288, ema_decay=0.95)),
    ("record11", dict(trajectories=1, cycles=20, restart="fresh", first_cycle_epochs=16, epochs_per_cycle=32, loop_from=0.5,
                      schedule="warmdown", momentum_warmup=300, ema_decay=0.95, ema_share=0.4, batch_tokens_ends=524_288,
                      distill_from=1, distill_alpha=0.7, distill_temperature=1)),
])
def test_the_recipes_are_the_published_ones(name, other):
    config = vars(from_args([str(ROOT / "configs" / f"{name}.py")], "")[0])
    assert {key: config[key] for key in RECORD} == {**RECORD, **other}


def test_single_is_tiny_without_a_population():
    tiny, single = (vars(from_args([str(ROOT / "configs" / f"{name}.py")], "")[0]) for name in ("tiny", "single"))
    assert {k for k in tiny if tiny[k] != single[k]} == {
        "run_dir", "trajectories", "cycles", "epochs_per_cycle", "schedule", "distill_from"}


def test_the_record_is_the_paper_run_with_more_of_it():
    paper, record = (vars(from_args([str(ROOT / "configs" / f"{name}.py")], "")[0]) for name in ("1p8b", "1p8b_960"))
    assert {k for k in paper if paper[k] != record[k]} == {"run_dir", "trajectories", "cycles"}


def test_every_knob_is_read_and_used():
    code = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("infra/*.py")])
    settings = "".join(p.read_text() for p in [*CONFIGS, ROOT / "README.md"])
    for name in FIELDS:
        assert re.search(rf"\b(config|c|self)\.{name}\b", code), f"{name} is read nowhere"
        assert re.search(rf"^{name} = |--{name}=", settings, re.M), f"{name} is used by no config and no documented command"


def test_identity_leaves_out_what_may_differ():
    identity = from_args([TINY], "")[0].identity()
    assert not {"run_dir", "data_dir", "data", "micro_batch", "compile", "trajectories"} & identity.keys()
    assert {"n_layer", "vocab_size", "seed", "cycles", "train_tokens"} <= identity.keys()
    assert set(identity) <= {f.name for f in dataclasses.fields(Config)}
