"""
Every setting, once: its name, its unit, its rule. A config file assigns names (it is Python, and is executed), the command
line overrides them with --name=value, the last one wins. Whatever is wrong ends here, before anything else happens.
"""
import contextlib
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

from infra.console import exit_with_error
from model import GPTConfig

VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}          # the separator included: it is the last id


def free(**default):
    """A field that may differ between two launches on one run directory; all others are its identity."""
    return dataclasses.field(metadata={"free": True}, **default)


@dataclass(kw_only=True)
class Config(GPTConfig):
    vocab_size: int = dataclasses.field(init=False)     # follows from the tokenizer
    # data
    data: str = free(default="manual")      # manual, fineweb, or .txt, .jsonl, .parquet files and folders, with commas
    data_dir: str = free()                  # where data.prepare writes the token files
    tokenizer: str = "bytes"                # bytes (256 + separator) or gpt2 (BPE)
    train_tokens: int                       # the train file, the fitness set at its front included
    val_tokens: int
    fitness_tokens: int                     # held out from training, for the prior: whole documents until at least so many
    epoch_multiple: int = 16                # an epoch is cut to a multiple of so many sequences
    # population: trajectories x cycles members, one at the end of every cycle
    run_dir: str = free()
    trajectories: int = free()              # free: a finished population may be given more of them
    cycles: int                             # per trajectory
    epochs_per_cycle: float = 2.0
    first_cycle_epochs: float = 0.0         # where the first cycle has another length
    seed: int = 42                          # trajectory t draws from seed + t; repeats go in steps of 1,000
    restart: str = "noise"                  # how a cycle starts: noise on the weights; fresh weights; none: one decay for all
    # a decay: a cycle, or with restart=none all of them
    schedule: str = "cycle"                 # cycle: rate down, decay up, linearly; cosine: rate to 0; warmdown: flat, then to 0
    loop_from: float = 0.0                  # the part of it after which the looped layers run
    ema_decay: float = 0.0                  # a member is an EMA of the weights at its cycle's end; 0: the last weights
    ema_every: int = 10                     # steps between two updates of that EMA
    ema_share: float = 1.0                  # of that EMA in the member, the rest the last weights
    momentum_warmup: int = 0                # steps over which Muon's momentum rises by 0.1 to its value
    lr_scale: float = 0.25                  # multiplies the optimizer's peak rates
    batch_tokens: int                       # tokens per step, over all ranks of a trajectory: in the middle cycles,
    batch_tokens_ends: int = 0              # and in the first and last quarter; 0: the same
    micro_batch: int = free()               # the most sequences of a rank in one backward pass
    # chain distillation
    distill_from: int = 8                   # the first cycle that has a teacher; >= cycles: none has
    distill_alpha: float = 0.45             # weight of the teacher's term
    distill_temperature: float = 1.2
    # distill.py --student: one model taught by a finished population, on one cosine without dropout
    student_teachers: int = free(default=4)     # K: prior.json's answer for this K teaches
    student_epochs: float = free(default=16.0)
    student_alpha: float = free(default=0.85)   # weight of the teachers' term, at temperature 1
    # running
    resume_every: int = free(default=0)     # steps between two checkpoints inside a cycle; 0: only at its end
    compile: bool = free(default=False)     # torch.compile, block by block, on CUDA; the CPU is always eager

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
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("free")}


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.init}
MAY_BE_ZERO = {"first_cycle_epochs", "momentum_warmup", "student_alpha", "dropout", "mtp_weight", "loop_start", "loop_end",
               "loop_extra", "loop_from", "batch_tokens_ends", "ema_decay", "seed", "distill_alpha", "resume_every"}
CHOICES = {"tokenizer": VOCAB_SIZE, "schedule": ("cycle", "cosine", "warmdown"), "restart": ("noise", "fresh", "none")}
GONE = {            # settings of older versions -> what took their place
    "vocab_size": "it follows from the tokenizer",
    "keep": "every member keeps its weights, and train.py checks the disk for room before its first step",
    "packings": "distill.py --student asks its teachers themselves, nothing is stored",
    "distill_teacher": "the predecessor teaches (another member: teacher_of in distill.py), a mixture: distill.py --student",
    "student_from": "a student starts from the best member",
    "checkpoint": "a lower micro_batch saves memory",
    "members": "python -m tools.import_slowrun writes members from the public script's snapshots, prior.py weighs them",
}


def rules(c):
    """(holds, name, the rule and how to fix it) for every rule that is not about types."""
    for name in FIELDS:
        value = getattr(c, name)
        if type(value) in (int, float):
            in_range = 0 <= value < 2 ** 31 and (value > 0 or name in MAY_BE_ZERO)
            yield in_range, name, f"must be {'0 or more' if name in MAY_BE_ZERO else 'more than 0'}, and less than 2^31"
    for name, values in CHOICES.items():
        yield getattr(c, name) in values, name, f"must be one of {', '.join(values)}"
    for name in ("run_dir", "data_dir"):
        path = os.fsencode(getattr(c, name))
        yield max(map(len, path.split(b"/"))) < 240 and len(path) < 3800, name, "is too long a name for a file system"
    for name in ("dropout", "loop_from", "ema_decay"):
        yield getattr(c, name) < 1, name, "must be below 1"
    for name in ("distill_alpha", "student_alpha", "ema_share"):
        yield getattr(c, name) <= 1, name, "must be at most 1"
    yield not c.ema_decay or c.restart != "none" or c.cycles == 1, "ema_decay", \
        "would disturb the one decay of restart=none: set one of them only"
    yield set(c.window_pattern) <= set("SL"), "window_pattern", "must be letters S and L, such as SSSL"
    yield c.n_layer % 2 == 0, "n_layer", f"must be even (half encoder, half decoder); try {c.n_layer + 1}"
    width = 2 * c.n_head
    yield c.n_embd % width == 0, "n_embd", \
        f"must be a multiple of 2 x n_head={c.n_head}, for heads of even width; try {(c.n_embd // width + 1) * width}"
    yield c.n_embd >= 32, "n_embd", "must be at least 32, the inputs of the value gate"
    yield c.sequence_len >= 4, "sequence_len", "must be at least 4"
    yield not c.loop_extra or c.n_layer // 2 <= c.loop_start < c.loop_end <= c.n_layer, "loop_start", \
        f"looped layers are decoder layers: {c.n_layer // 2} <= loop_start < loop_end <= {c.n_layer}, or set loop_extra=0"
    for name in ("batch_tokens", "batch_tokens_ends"):
        sequences, rest = divmod(getattr(c, name), c.sequence_len)
        yield not rest, name, f"must be a multiple of sequence_len={c.sequence_len}; try {(sequences + 1) * c.sequence_len}"
    for name in ("fitness_tokens", "val_tokens"):
        yield getattr(c, name) > c.sequence_len, name, f"must hold a sequence: more than sequence_len={c.sequence_len}"
    yield c.train_tokens > c.fitness_tokens, "train_tokens", \
        f"must be more than fitness_tokens={c.fitness_tokens}, which come from it"


WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def typed(name, kind, value):
    """A value of this type: text (from the command line) is read, anything else must fit; an int is a fine float."""
    if type(value) is str and kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    elif kind is float and type(value) is int or type(value) is str and kind is not str:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(value)
    if type(value) is not kind or value == "":
        exit_with_error(f"{name}={value!r}: must be {WORDS[kind]}")
    return value


def known(name):
    """A setting's name. Exits with code 2 where there is none, with the nearest one."""
    if name in GONE:
        exit_with_error(f"'{name}' is no setting: {GONE[name]}")
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
        exit_with_error(f"unknown setting '{name}'" + (f": did you mean '{near[0]}'?" if near else
                                                       "; infra/config.py lists the known ones"))
    return name


def student_of(c):
    """The Config of a population's one student: a population of one, in run_dir/student."""
    return dataclasses.replace(
        c, run_dir=os.path.join(c.run_dir, "student"), trajectories=1, cycles=1, epochs_per_cycle=c.student_epochs,
        first_cycle_epochs=0.0, schedule="cosine", restart="noise", ema_decay=0.0, dropout=0.0,
        distill_from=0, distill_alpha=c.student_alpha, distill_temperature=1.0)


def read_file(path):
    """
    The values that a config file assigns; what it imports or defines is none. It is Python, as nanoGPT's: read it before
    you run a stranger's.
    """
    names = {"__file__": path}
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), names)
    except OSError as e:
        exit_with_error(f"cannot read config '{path}': {e.strerror}; configs/tiny.py is an example")
    except Exception as e:
        exit_with_error(f"config '{path}' is not a list of assignments: {type(e).__name__}: {e}")
    values = {k: v for k, v in names.items() if not k.startswith("_") and not callable(v) and not isinstance(v, ModuleType)}
    return {known(k): typed(k, FIELDS[k].type, v) for k, v in values.items()}


def recipe(epochs):
    """
    How the paper spends a budget of epochs (section 5, measured regimes): name -> value. Below 8: one trajectory, one
    decay (its rates are ours, the paper names none), four snapshots on its last epoch. Else cycles of two epochs.
    """
    if epochs < 8:
        before = epochs - 1 if epochs > 1 else 0.85
        gap = (epochs - before) / 4
        return dict(trajectories=1, cycles=4, epochs_per_cycle=gap, first_cycle_epochs=before + gap, restart="none",
                    distill_from=4, batch_tokens_ends=0)
    trajectories = next((n for n, most in ((1, 128), (2, 256), (3, 512), (4, 1024)) if epochs <= most), 5)
    return dict(trajectories=trajectories, cycles=epochs // (2 * trajectories), epochs_per_cycle=2.0,
                first_cycle_epochs=0.0, restart="noise")


def budget(epochs, values, given):
    """The values of recipe(epochs). Exits with code 2 where the config's or the command line's values contradict them."""
    if not 0 < epochs <= 100_000:
        exit_with_error(f"epochs={epochs}: must be a whole number from 1 to 100,000, over all trajectories together")
    if values.get("schedule", "cycle") != "cycle":
        exit_with_error(f"epochs={epochs}: the recipe is one of schedule=cycle, this config has "
                        f"schedule={values['schedule']}; set its epochs_per_cycle")
    chosen = recipe(epochs)
    if chosen.keys() & given.keys():
        exit_with_error(f"epochs={epochs} already chooses {', '.join(sorted(chosen.keys() & given.keys()))}: "
                        "give one or the other")
    return chosen


def from_args(argv, usage, **options):
    """
    (the checked Config, the options) of a command line `CONFIG [--name=value ...]` (argv None: the process's own). options:
    names and defaults that this script alone knows and no run remembers; --epochs=E stands for the values of recipe(E).
    usage is the script's docstring, printed by --help. Exits with code 2 on bad input.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        raise SystemExit(0)
    paths = [a for a in argv if not a.startswith("--")]
    if len(paths) != 1:
        exit_with_error(f"give one config file, such as configs/tiny.py, not {' '.join(map(repr, paths)) or 'none'}; "
                        "overrides are written --name=value")
    given, options = {}, {**options, "epochs": 0}
    for name, equals, text in (a[2:].partition("=") for a in argv if a.startswith("--")):
        kind = type(options[name]) if name in options else FIELDS[known(name)].type
        if not equals and kind is not bool:
            exit_with_error(f"--{name} has no value: write --{name}=VALUE")
        given[name] = typed(name, kind, text if equals else True)
    options |= {name: given[name] for name in options if name in given}
    own = {name: value for name, value in given.items() if name in FIELDS}
    values = read_file(paths[0]) | own
    if "epochs" in given:
        values |= budget(given["epochs"], values, own)
    missing = [name for name, f in FIELDS.items() if name not in values and f.default is dataclasses.MISSING]
    if missing:
        exit_with_error(f"config '{paths[0]}' does not set {', '.join(missing)}; configs/tiny.py is an example")
    config = Config(**values)
    for holds, name, rule in rules(config):
        if not holds:
            exit_with_error(f"{name}={getattr(config, name)!r}: {rule}")
    return config, SimpleNamespace(**options)
