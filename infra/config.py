"""
Every setting, once: its name, its unit, its rule. A config file assigns names (it is Python, and is
executed), the command line overrides them with --name=value. What is wrong ends here, before anything else.
"""
import contextlib
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

from infra.console import fail
from model import GPTConfig

VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}          # the separator included: it is the last id


@dataclass(kw_only=True)
class Config(GPTConfig):
    vocab_size: int = dataclasses.field(init=False)     # follows from the tokenizer
    # data
    data: str = "manual"                    # manual, fineweb, or text files and folders, separated by commas
    data_dir: str                           # where data.prepare writes the token files
    tokenizer: str = "bytes"                # bytes (256 + separator) or gpt2 (BPE)
    train_tokens: int                       # the train file, the fitness set at its front included
    val_tokens: int
    fitness_tokens: int                     # held out for the prior: whole documents until at least so many
    epoch_multiple: int = 16                # an epoch is cut to a multiple of so many sequences
    # population: trajectories x cycles members, one at the end of every cycle
    run_dir: str
    trajectories: int                       # a finished population may be given more of them
    cycles: int                             # per trajectory
    epochs_per_cycle: float = 2.0
    first_cycle_epochs: float = 0.0         # where the first cycle has another length
    seed: int = 42                          # trajectory t draws from seed + t; repeats go in steps of 1,000
    restart: str = "noise"                  # between cycles: noise; fresh weights; none: one decay for all
    # a decay: a cycle, or with restart=none all of them
    schedule: str = "cycle"                 # cycle (rate falls, decay rises), cosine, warmdown (flat, falls)
    loop_from: float = 0.0                  # the part of it after which the looped layers run
    ema_decay: float = 0.0                  # a member is an EMA of a cycle's last weights; 0: the last ones
    ema_every: int = 10                     # steps between two updates of that EMA
    ema_share: float = 1.0                  # of that EMA in the member, the rest the last weights
    momentum_warmup: int = 0                # steps over which Muon's momentum rises by 0.1 to its value
    lr_scale: float = 0.25                  # multiplies the optimizer's peak rates
    batch_tokens: int                       # tokens per step over a trajectory's ranks: in the middle cycles,
    batch_tokens_ends: int = 0              # and in the first and last quarter; 0: the same
    micro_batch: int                        # the most sequences of a rank in one backward pass
    # chain distillation
    distill_from: int = 8                   # the first cycle that has a teacher; >= cycles: none has
    distill_alpha: float = 0.45             # weight of the teacher's term
    distill_temperature: float = 1.2
    # distill.py --student: one model taught by a finished population, on one cosine without dropout
    student_teachers: int = 4               # K: prior.json's answer for this K teaches
    student_epochs: float = 16.0
    student_alpha: float = 0.85             # weight of the teachers' term, at temperature 1
    # running
    resume_every: int = 0                   # steps between two checkpoints inside a cycle; 0: only at its end
    compile: bool = False                   # torch.compile, block by block, on CUDA; the CPU is always eager

    def __post_init__(self):
        self.vocab_size = VOCAB_SIZE.get(self.tokenizer, 0)
        self.batch_tokens_ends = self.batch_tokens_ends or self.batch_tokens
        self.run_dir, self.data_dir = os.path.expanduser(self.run_dir), os.path.expanduser(self.data_dir)

    def cycle_epochs(self, cycle):
        return self.first_cycle_epochs if cycle == 0 and self.first_cycle_epochs else self.epochs_per_cycle

    def epochs_until(self, cycles):
        """Of one trajectory's first cycles together."""
        return sum(map(self.cycle_epochs, range(cycles)))

    def identity(self):
        """What a run directory must agree with: name -> value."""
        return {name: value for name, value in vars(self).items() if name not in FREE}


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.init}
# may differ between two launches on one run directory; all others are its identity
FREE = {"data", "data_dir", "run_dir", "trajectories", "micro_batch", "student_teachers", "student_epochs",
        "student_alpha", "resume_every", "compile"}
MAY_BE_ZERO = {"first_cycle_epochs", "momentum_warmup", "student_alpha", "dropout", "mtp_weight", "loop_from",
               "loop_start", "loop_end", "loop_extra", "ema_decay", "seed", "distill_alpha", "resume_every"}
CHOICES = {"tokenizer": tuple(VOCAB_SIZE), "schedule": ("cycle", "cosine", "warmdown"),
           "restart": ("noise", "fresh", "none")}


def rules(c):
    """(holds, name, the rule) for every rule that is not about types."""
    for name in FIELDS:
        value, least = getattr(c, name), "0 or more" if name in MAY_BE_ZERO else "more than 0"
        if type(value) in (int, float):
            in_range = 0 <= value < 2 ** 31 and (value > 0 or name in MAY_BE_ZERO)
            yield in_range, name, f"must be {least}, and below 2^31"
    for name, values in CHOICES.items():
        yield getattr(c, name) in values, name, f"must be one of {', '.join(values)}"
    yield c.trajectories * c.cycles <= 100_000, "cycles", "must make at most 100,000 members"
    for name in ("dropout", "loop_from", "ema_decay"):
        yield getattr(c, name) < 1, name, "must be below 1"
    for name in ("distill_alpha", "student_alpha", "ema_share"):
        yield getattr(c, name) <= 1, name, "must be at most 1"
    yield not c.ema_decay or c.restart != "none" or c.cycles == 1, "ema_decay", "must be 0 with restart=none"
    yield set(c.window_pattern) <= set("SL"), "window_pattern", "must be letters S and L, such as SSSL"
    yield c.n_layer % 2 == 0, "n_layer", f"must be even (half encoder, half decoder); try {c.n_layer + 1}"
    n = 2 * c.n_head
    yield c.n_embd % n == 0, "n_embd", (f"must be a multiple of 2 x n_head={c.n_head}, for heads of even "
                                        f"width; try {(c.n_embd // n + 1) * n}")
    yield c.n_embd >= 32, "n_embd", "must be at least 32, the inputs of the value gate"
    yield c.sequence_len >= 4, "sequence_len", "must be at least 4"
    half, L = c.n_layer // 2, c.n_layer
    yield not c.loop_extra or half <= c.loop_start < c.loop_end <= L, "loop_start", (
        f"must be of decoder layers: {half} <= loop_start < loop_end <= {L}, or set loop_extra=0")
    for name in ("batch_tokens", "batch_tokens_ends"):
        tokens, T = getattr(c, name), c.sequence_len
        yield tokens % T == 0, name, f"must be a multiple of sequence_len={T}; try {(tokens // T + 1) * T}"
    for name in ("fitness_tokens", "val_tokens"):
        yield getattr(c, name) > c.sequence_len, name, f"must be more than sequence_len={c.sequence_len}"
    yield c.train_tokens > c.fitness_tokens, "train_tokens", f"must exceed fitness_tokens={c.fitness_tokens}"


def typed(name, kind, value):
    """A value of this type: text (of the command line) is read, all else must fit; an int is a fine float."""
    if type(value) is str and kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    elif kind is float and type(value) is int or type(value) is str and kind is not str:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(value)
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if type(value) is not kind or value == "":
        fail(f"{name}={value!r}: must be {words[kind]}")
    return value


def known(name):
    """The name of a setting. Exits with code 2 where there is none, with the nearest one."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "infra/config.py lists the known ones"
        fail(f"unknown setting '{name}': {hint}")
    return name


def student_of(c):
    """The Config of a population's one student: a population of one, in run_dir/student."""
    return dataclasses.replace(
        c, run_dir=os.path.join(c.run_dir, "student"), trajectories=1, cycles=1, schedule="cosine",
        epochs_per_cycle=c.student_epochs, first_cycle_epochs=0.0, restart="noise", ema_decay=0.0,
        dropout=0.0, distill_from=0, distill_alpha=c.student_alpha, distill_temperature=1.0)


def read_file(path):
    """What a config file assigns, but modules and functions. It is Python: read a stranger's first."""
    names = {"__file__": path}
    try:
        with open(path, encoding="utf-8-sig") as f:
            exec(compile(f.read(), path, "exec"), names)
    except (Exception, SystemExit) as e:
        fail(f"cannot use config '{path}' ({type(e).__name__}: {e}); configs/tiny.py is an example")
    return {known(k): typed(k, FIELDS[k].type, v) for k, v in names.items()
            if not k.startswith("_") and not callable(v) and not isinstance(v, ModuleType)}


def recipe(epochs):
    """
    How the paper spends a budget of epochs: name -> value. Below 8: one trajectory, one decay (its rates are
    ours, the paper names none), four snapshots on its last epoch. From 8 on cycles of 2 epochs, in as many
    trajectories as the text names: ceil(log2(epochs / 64)), where eq. 3 prints the floor; extrapolated past
    512 (the record at 960 has 5).
    """
    if epochs < 8:
        before = epochs - 1 if epochs > 1 else 0.85
        gap = (epochs - before) / 4
        return dict(trajectories=1, cycles=4, epochs_per_cycle=gap, first_cycle_epochs=before + gap,
                    restart="none", distill_from=4, batch_tokens_ends=0)
    trajectories = next((n for n, most in ((1, 128), (2, 256), (3, 512), (4, 1024)) if epochs <= most), 5)
    return dict(trajectories=trajectories, cycles=epochs // (2 * trajectories), epochs_per_cycle=2.0,
                first_cycle_epochs=0.0, restart="noise")


def from_args(argv, usage, **options):
    """
    (the checked Config, the options) of a command line `CONFIG [--name=value ...]`, argv or the process's.
    options: names and defaults that this script alone knows and no run remembers; --epochs=E stands for the
    values of recipe(E). usage: the script's docstring, printed by --help. Exits with code 2 on bad input.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print((usage or "CONFIG [--name=value ...]").strip())       # python -OO drops docstrings
        raise SystemExit(0)
    paths = [a for a in argv if not a.startswith("--")]
    if len(paths) != 1:
        fail(f"give one config file, such as configs/tiny.py, and --name=value, not {paths or 'none'}")
    given, options = {}, {**options, "epochs": 0}
    for name, equals, text in (a[2:].partition("=") for a in argv if a.startswith("--")):
        kind = type(options[name]) if name in options else FIELDS[known(name)].type
        if not equals and kind is not bool:
            fail(f"--{name} has no value: write --{name}=VALUE")
        given[name] = typed(name, kind, text if equals else True)
    own = {name: given.pop(name) for name in options if name in given}
    values = read_file(paths[0]) | given
    if "epochs" in own:
        epochs = own["epochs"]
        if not 0 < epochs <= 100_000 or values.get("schedule", "cycle") != "cycle":
            fail(f"epochs={epochs}: must be from 1 to 100,000, and the schedule the paper's cycle")
        if both := sorted(recipe(epochs).keys() & given.keys()):
            fail(f"epochs={epochs} already chooses {', '.join(both)}: give one or the other")
        values |= recipe(epochs)
    required = [name for name, f in FIELDS.items() if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        fail(f"config '{paths[0]}' does not set {', '.join(missing)}; configs/tiny.py is an example")
    config = Config(**values)
    for holds, name, rule in rules(config):
        if not holds:
            fail(f"{name}={getattr(config, name)!r}: {rule}")
    return config, SimpleNamespace(**options | own)
