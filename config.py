"""
Every knob, once: its name, its unit, its rule. A config file assigns names (it is Python, and is executed), the command
line overrides them with --name=value, the last one wins. Whatever is wrong is refused here, before anything else happens.
"""
import contextlib
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

from errors import refuse
from model import GPTConfig

VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}          # the separator included: it is the last id


def free(**default):
    """A field that may differ between two launches on one run directory; all others belong to its identity."""
    return dataclasses.field(metadata={"free": True}, **default)


@dataclass(kw_only=True)
class Config(GPTConfig):
    vocab_size: int = dataclasses.field(init=False)     # follows from the tokenizer
    # data
    data: str = free(default="manual")      # manual, fineweb, or .txt, .jsonl, .parquet files and folders, separated by commas
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
    seed: int = 42                          # trajectory t draws from seed + t; repeats go in steps of 1,000
    first_cycle_epochs: float = 0.0         # where the first cycle has another length
    restart: str = "noise"                  # how a cycle starts: noise, rates anew; fresh weights; none: cycles share one decay
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
    micro_batch: int = free()               # sequences per rank and backward pass
    # chain distillation
    distill_from: int = 8                   # the first cycle that has a teacher; >= cycles: none has
    distill_alpha: float = 0.45             # weight of the teacher's term
    distill_temperature: float = 1.2
    # distill.py --student: one model taught by a finished population, on one cosine without dropout
    student_teachers: int = free(default=4)     # K: prior.json's answer for this K teaches
    student_epochs: float = free(default=16.0)
    student_alpha: float = free(default=0.85)   # weight of the teachers' term, at temperature 1
    # running
    resume_every: int = free(default=0)     # steps between two states to go on from inside a cycle; 0: only at its end
    compile: bool = free(default=False)     # torch.compile, block by block, on CUDA; the CPU is always eager

    def __post_init__(self):
        self.vocab_size = VOCAB_SIZE.get(self.tokenizer, 0)
        self.batch_tokens_ends = self.batch_tokens_ends or self.batch_tokens

    def cycle_epochs(self, cycle):
        return self.first_cycle_epochs if cycle == 0 and self.first_cycle_epochs else self.epochs_per_cycle

    def epochs_until(self, cycles):
        """Of one trajectory's first cycles together."""
        return sum(map(self.cycle_epochs, range(cycles)))

    def identity(self):
        """What a run directory must agree with: name -> value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("free")}


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.init}
GONE = {            # names of older versions -> what took their place
    "keep": "every member keeps its weights, and train.py checks the disk for room before its first step",
    "packings": "distill.py --student asks its teachers themselves, nothing is stored",
    "distill_teacher": "the predecessor teaches (another member: teacher_of in distill.py), a mixture teaches distill.py --student",
    "student_from": "a student starts from the best member",
    "members": "python -m tools.import_slowrun writes members from the public script's snapshots, prior.py weighs them as its own",
}
MAY_BE_ZERO = {"first_cycle_epochs", "momentum_warmup", "student_alpha", "dropout", "mtp_weight",
               "loop_start", "loop_end", "loop_extra", "loop_from", "ema_decay", "seed", "distill_alpha", "resume_every"}
CHOICES = {"tokenizer": tuple(VOCAB_SIZE), "schedule": ("cycle", "cosine", "warmdown"), "restart": ("noise", "fresh", "none")}


def rules(c):
    """(holds, key, what is wrong and how to mend it) for every rule that is not about types."""
    for key in FIELDS:
        value = getattr(c, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            in_range = 0 <= value < 2 ** 31 and (value > 0 or key in MAY_BE_ZERO)
            yield in_range, key, f"must be {'0 or more' if key in MAY_BE_ZERO else 'more than 0'}, and less than 2^31"
    for key, values in CHOICES.items():
        yield getattr(c, key) in values, key, f"must be {', '.join(values[:-1])} or {values[-1]}"
    for key in ("run_dir", "data_dir"):
        path = os.fsencode(getattr(c, key))
        yield max(map(len, path.split(b"/"))) < 240 and len(path) < 3800, key, "is too long a name for a file system"
    yield not c.ema_decay or c.restart != "none" or c.cycles == 1, "ema_decay", \
        "would disturb the one decay of restart=none: set one of them only"
    yield set(c.window_pattern) <= set("SL") and c.window_pattern, "window_pattern", "must be letters S and L, such as SSSL"
    yield c.n_layer % 2 == 0, "n_layer", f"must be even (half encoder, half decoder); try {c.n_layer + 1}"
    yield c.n_embd % (2 * c.n_head) == 0, "n_embd", \
        f"must be a multiple of 2 x n_head={c.n_head}, for heads of even width; " \
        f"try {(c.n_embd // (2 * c.n_head) + 1) * 2 * c.n_head}"
    yield c.n_embd >= 32, "n_embd", "must be at least 32, the inputs of the value gate"
    yield c.sequence_len >= 4, "sequence_len", "must be at least 4"
    for key in ("dropout", "loop_from", "ema_decay"):
        yield getattr(c, key) < 1, key, "must be below 1"
    for key in ("distill_alpha", "student_alpha", "ema_share"):
        yield getattr(c, key) <= 1, key, "must be at most 1"
    yield not c.loop_extra or c.n_layer // 2 <= c.loop_start < c.loop_end <= c.n_layer, "loop_start", \
        f"looped layers must be decoder layers: {c.n_layer // 2} <= loop_start < loop_end <= {c.n_layer}, or set loop_extra=0"
    for key in ("batch_tokens", "batch_tokens_ends"):
        sequences, rest = divmod(getattr(c, key), c.sequence_len)
        yield not rest, key, f"must be a multiple of sequence_len={c.sequence_len}; try {(sequences + 1) * c.sequence_len}"
    for key in ("fitness_tokens", "val_tokens"):
        yield getattr(c, key) > c.sequence_len, key, f"must hold a sequence: more than sequence_len={c.sequence_len}"
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
        refuse(f"{name}={value!r}: wants {WORDS[kind]}")
    return value


def known(name):
    if name in FIELDS:
        return name
    if name == "vocab_size":
        refuse("vocab_size follows from the tokenizer: set tokenizer instead")
    if name in GONE:
        refuse(f"{name} is no setting any more: {GONE[name]}")
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    refuse(f"unknown config name '{name}'" + (f": did you mean '{near[0]}'?" if near else "; config.py lists the known ones"))


def student_of(c):
    """The Config of a population's one student: a population of one, in run_dir/student."""
    return dataclasses.replace(
        c, run_dir=os.path.join(c.run_dir, "student"), trajectories=1, cycles=1, epochs_per_cycle=c.student_epochs,
        first_cycle_epochs=0.0, schedule="cosine", restart="noise", ema_decay=0.0, dropout=0.0,
        distill_from=0, distill_alpha=c.student_alpha, distill_temperature=1.0)


def read_file(path):
    """The names that a config file assigns. It is Python, as nanoGPT's: read it before you run a stranger's."""
    names = {}
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), names)
    except OSError as e:
        refuse(f"cannot read config {path}: {e.strerror}; configs/tiny.py is an example")
    except Exception as e:
        refuse(f"config {path} is not a list of assignments: {type(e).__name__}: {e}")
    return {known(k): typed(k, FIELDS[k].type, v) for k, v in names.items() if not k.startswith("_")}


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
        refuse(f"epochs={epochs}: no recipe fits it; wants a whole number from 1 to 100,000, over all trajectories together")
    if values.get("schedule", "cycle") != "cycle":
        refuse(f"epochs={epochs}: the recipe is one of schedule=cycle, "
               f"this config has schedule={values['schedule']}; set its epochs_per_cycle")
    chosen = recipe(epochs)
    if chosen.keys() & given.keys():
        refuse(f"epochs={epochs} already chooses {', '.join(sorted(chosen.keys() & given.keys()))}: give one or the other")
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
        refuse(f"want one config file, such as configs/tiny.py, got {' '.join(paths) or 'none'}; "
               "overrides are written --name=value")
    given, options = {}, {**options, "epochs": 0}
    for name, equals, text in (a[2:].partition("=") for a in argv if a.startswith("--")):
        kind = type(options[name]) if name in options else FIELDS[known(name)].type
        if not equals and kind is not bool:
            refuse(f"--{name} has no value: write --{name}=VALUE")
        given[name] = typed(name, kind, text if equals else True)
    options |= {name: given[name] for name in options if name in given}
    own = {name: value for name, value in given.items() if name in FIELDS}
    values = read_file(paths[0]) | own
    if "epochs" in given:
        values |= budget(given["epochs"], values, own)
    missing = [k for k, f in FIELDS.items() if k not in values and f.default is dataclasses.MISSING]
    if missing:
        refuse(f"config {paths[0]} does not set {', '.join(missing)}; configs/tiny.py is an example")
    config = Config(**values)
    for holds, key, mend in rules(config):
        if not holds:
            refuse(f"{key}={getattr(config, key)!r}: {mend}")
    return config, SimpleNamespace(**options)
