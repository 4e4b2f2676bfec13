"""Config files and the command line: what is read, what is refused; every knob is read and used somewhere."""
import dataclasses
import re

import pytest

from infra.config import FIELDS, Config, from_args
from tests.conftest import ROOT, config_of

TINY = str(ROOT / "configs" / "tiny.py")
RULES = {           # what the line says: the flags that it says it of, of tiny.py
    "did you mean 'cycles'?": "cylces=3",
    "infra/config.py lists the known ones": "zzz=3, vocab_size=9",
    "0 or more, and below 2^31":
        "dropout=-0.5, seed=-1, seed=2147483648, resume_every=-1, momentum_warmup=-1, first_cycle_epochs=-1",
    "more than 0, and below 2^31":
        "cycles=0, micro_batch=0, student_teachers=0, student_epochs=0, ema_every=0, lr_scale=nan, "
        "lr_scale=inf, n_layer=99999999999999999999, epochs_per_cycle=1e308",
    "must be a whole number": "cycles=three, cycles=2.5, epochs=1.5, epochs=",
    "must be True or False": "compile=maybe, compile=",
    "must be a text": "run_dir=",
    "one of bytes, gpt2": "tokenizer=words",
    "one of cycle, cosine, warmdown": "schedule=linear",
    "one of noise, fresh, none": "restart=anew",
    "at most 100,000 members": "cycles=60000",
    "must be below 1": "dropout=1, loop_from=1, ema_decay=1",
    "must be at most 1": "distill_alpha=1.5, student_alpha=2, ema_share=1.5",
    "must be 0 with restart=none": "ema_decay=0.9 restart=none",
    "letters S and L, such as SSSL": "window_pattern=SX",
    "must be even (half encoder, half decoder); try 4": "n_layer=3",
    "2 x n_head=4, for heads of even width; try 136": "n_embd=130",
    "must be at least 32": "n_embd=16",
    "must be at least 4": "sequence_len=2",
    "2 <= loop_start < loop_end <= 4": "loop_start=0 loop_extra=2, loop_start=1 loop_end=4 loop_extra=1",
    "multiple of sequence_len=128; try 1024": "batch_tokens=1000",
    "multiple of sequence_len=128; try 128": "batch_tokens_ends=100",
    "more than sequence_len=128": "fitness_tokens=128, val_tokens=128",
    "must exceed fitness_tokens=16384": "train_tokens=16384",
    "--seed=VALUE": "seed",
    "from 1 to 100,000, and the schedule the paper's": "epochs=0, epochs=100001, epochs=16 schedule=cosine",
    "already chooses cycles, trajectories": "epochs=16 trajectories=2 cycles=8",
    "already chooses first_cycle_epochs, restart": "epochs=16 restart=none first_cycle_epochs=9",
    "already chooses restart": "epochs=4 restart=noise",
}


@pytest.mark.parametrize("flags, rule", [(f, rule) for rule, many in RULES.items() for f in many.split(", ")])
def test_what_breaks_a_rule_is_refused(flags, rule, refused):
    line = refused(from_args, [TINY, *(f"--{flag}" for flag in flags.split())], "usage")
    assert rule in line and flags.partition("=")[0] in line, line


def test_overrides_are_typed_and_the_last_one_wins():
    config = config_of("tiny", "--cycles=3", "--lr_scale=1", "--compile=true", "--cycles=5", "--data=a.txt,b")
    assert (config.cycles, config.lr_scale, config.compile, config.data) == (5, 1.0, True, "a.txt,b")
    assert type(config.lr_scale) is float


def test_what_follows_from_other_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = config_of("tiny", "--tokenizer=gpt2", "--batch_tokens=2048", "--run_dir=~/x", "--data_dir=~/d")
    assert (config.vocab_size, config.batch_tokens_ends) == (50257, 2048)
    assert (config.run_dir, config.data_dir) == ("/home/someone/x", "/home/someone/d")
    assert config_of("tiny", "--batch_tokens_ends=512").batch_tokens_ends == 512


def test_a_budget_becomes_a_population():
    """Epochs -> trajectories, cycles of two epochs: as many as fit into it."""
    for epochs, trajectories, cycles in (
            (8, 1, 4), (56, 1, 28), (128, 1, 64), (129, 2, 32), (256, 2, 64), (257, 3, 42), (512, 3, 85),
            (513, 4, 64), (1024, 4, 128), (1025, 5, 102)):
        c = config_of("tiny", f"--epochs={epochs}")
        assert (c.trajectories, c.cycles, c.epochs_per_cycle, c.restart) == (trajectories, cycles, 2, "noise")
        assert c.epochs_until(c.cycles) == 2 * cycles


@pytest.mark.parametrize("epochs, first, gap", [(1, 0.8875, 0.0375), (2, 1.25, 0.25), (7, 6.25, 0.25)])
def test_a_small_budget_is_one_decay_with_snapshots_at_its_end(epochs, first, gap):
    config = config_of("tiny", f"--epochs={epochs}")
    assert (config.trajectories, config.cycles, config.restart, config.distill_from) == (1, 4, "none", 4)
    assert [config.cycle_epochs(c) for c in range(4)] == pytest.approx([first, gap, gap, gap])
    assert config.epochs_until(4) == pytest.approx(epochs) and config.batch_tokens_ends == config.batch_tokens


def test_what_a_config_imports_or_defines_is_no_setting(tmp_path):
    """As in nanoGPT's: an import, a function, a class, its own path; nor is Windows' mark at the front."""
    config = tmp_path / "mine.py"
    config.write_text("import os\nfrom math import pi\ndef half(n):\n    return n // 2\nclass Shape: pass\n"
                      "_twice = 2\nassert os.path.exists(__file__)\n"
                      + (ROOT / "configs" / "tiny.py").read_text() + "\nn_layer = half(8) * _twice\ndel pi\n",
                      encoding="utf-8-sig")
    assert from_args([str(config)], "")[0].n_layer == 8


RECORD = dict(              # slowrun.md, written out once more
    data="fineweb", tokenizer="gpt2", train_tokens=100_000_000, val_tokens=10_000_000, fitness_tokens=132_000,
    epoch_multiple=16, n_layer=30, n_head=16, n_embd=2048, sequence_len=2048, window_pattern="SSSL", iha=True,
    dropout=0.1, mtp_weight=0.3, loop_start=15, loop_end=25, loop_extra=4, loop_from=0, restart="noise",
    schedule="cycle", ema_decay=0, ema_share=1, momentum_warmup=0, lr_scale=0.25, batch_tokens=524_288,
    batch_tokens_ends=393_216, seed=42, epochs_per_cycle=2, first_cycle_epochs=0, distill_from=8,
    distill_alpha=0.45, distill_temperature=1.2, trajectories=5, cycles=96)


@pytest.mark.parametrize("name, other", [
    ("1p8b_960", {}),
    ("1p8b", dict(trajectories=2, cycles=64)),
    ("baseline", dict(trajectories=8, cycles=1, epochs_per_cycle=32, schedule="cosine", loop_from=0.5,
                      distill_from=1, batch_tokens_ends=524_288, ema_decay=0.95)),
    ("record11", dict(trajectories=1, cycles=20, restart="fresh", first_cycle_epochs=16, epochs_per_cycle=32,
                      loop_from=0.5, schedule="warmdown", momentum_warmup=300, ema_decay=0.95, ema_share=0.4,
                      batch_tokens_ends=524_288, distill_from=1, distill_alpha=0.7, distill_temperature=1)),
])
def test_the_recipes_are_the_published_ones(name, other):
    config = vars(config_of(name))
    assert {key: config[key] for key in RECORD} == {**RECORD, **other}


def test_single_is_tiny_without_a_population():
    tiny, single = (vars(config_of(name)) for name in ("tiny", "single"))
    assert {k for k in tiny if tiny[k] != single[k]} == {
        "run_dir", "trajectories", "cycles", "epochs_per_cycle", "schedule", "distill_from"}


def test_every_knob_is_read_and_used():
    code = "".join(p.read_text() for files in ("*.py", "data/*.py", "infra/*.py") for p in ROOT.glob(files))
    pages = [*ROOT.glob("configs/*.py"), ROOT / "README.md", ROOT / "docs" / "running.md"]
    settings = "".join(p.read_text() for p in pages)
    for name in FIELDS:
        assert re.search(rf"\b(config|c|self)\.{name}\b", code), f"{name} is read nowhere"
        assert re.search(rf"^{name} = |--{name}=", settings, re.M), f"{name} is in no config and no command"


def test_identity_leaves_out_what_may_differ():
    identity = config_of("tiny").identity()
    assert not {"run_dir", "data_dir", "data", "micro_batch", "compile", "trajectories"} & identity.keys()
    assert {"n_layer", "vocab_size", "seed", "cycles", "train_tokens"} <= identity.keys()
    assert set(identity) <= {f.name for f in dataclasses.fields(Config)}
