"""
Every knob, once: its name, its unit, its rule. A config file assigns names (it is Python, and is executed), the command
line overrides them with --name=value, the last one wins. Whatever is wrong is refused here, before anything else happens.
"""
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
    packings: int = 0                       # documents are packed in so many orders, over and over; 0: every epoch in a new one
    # population: trajectories x cycles members, one at the end of every cycle
    run_dir: str = free()
    trajectories: int = free()              # free: a finished population may be given more of them
    cycles: int                             # per trajectory
    epochs_per_cycle: float = 2.0
    seed: int = 42                          # trajectory t draws from seed + t; repeats go in steps of 1,000
    first_cycle_epochs: float | None = None     # where the first cycle has another length
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
    batch_tokens_ends: int | None = None    # and in the first and last quarter; None: the same
    micro_batch: int = free()               # sequences per rank and backward pass
    # chain distillation
    distill_from: int = 8                   # the first cycle that has a teacher; >= cycles: none has
    distill_teacher: str = "predecessor"    # its last member; best: its best on the fitness set; mixture: of all so far
    distill_alpha: float = 0.45             # weight of the teacher's term
    distill_temperature: float = 1.2
    # one student of the finished population (distill.py --student): one cosine, without dropout
    student_epochs: float = free(default=8.0)
    student_alpha: float = free(default=0.85)       # weight of the teacher's term, at temperature 1
    student_from: str = free(default="best")        # its first weights: best (member), or scratch
    # running
    keep: str = free(default="all")         # which members keep their weights: all; last: each trajectory's newest two
                                            # (all keep their scores; a student wants the weights)
    resume_every: int = free(default=0)     # steps between two states to go on from inside a cycle; 0: only at its end
    compile: bool = free(default=False)     # torch.compile, block by block, on CUDA; the CPU is always eager
    checkpoint: bool = free(default=False)  # repeats of looped layers are computed again for backward, not kept

    def __post_init__(self):
        self.vocab_size = VOCAB_SIZE.get(self.tokenizer, 0)
        if self.batch_tokens_ends is None:
            self.batch_tokens_ends = self.batch_tokens

    def cycle_epochs(self, cycle):
        return self.first_cycle_epochs if cycle == 0 and self.first_cycle_epochs else self.epochs_per_cycle

    def epochs_until(self, cycles):
        """Of one trajectory's first cycles together."""
        return sum(map(self.cycle_epochs, range(cycles)))

    def identity(self):
        """What a run directory must agree with: name -> value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata.get("free")}


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.init}
MAY_BE_ZERO = {"packings", "momentum_warmup", "student_alpha", "dropout", "mtp_weight",
               "loop_start", "loop_end", "loop_extra", "loop_from", "ema_decay", "seed", "distill_alpha", "resume_every"}
CHOICES = {"tokenizer": tuple(VOCAB_SIZE), "schedule": ("cycle", "cosine", "warmdown"), "restart": ("noise", "fresh", "none"),
           "keep": ("all", "last"), "distill_teacher": ("predecessor", "best", "mixture"), "student_from": ("best", "scratch")}
OPTIONAL = {int | None: int, float | None: float}


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
    yield c.keep == "all" or c.distill_teacher == "predecessor", "keep", \
        f"drops weights that distill_teacher={c.distill_teacher} may need: set keep=all"
    yield c.distill_teacher != "mixture" or c.packings, "packings", \
        "must be more than 0 with distill_teacher=mixture, which is stored for fixed packings; " \
        "try packings=4 (and distill_temperature=1)"
    yield c.distill_teacher != "mixture" or c.distill_temperature == 1, "distill_temperature", \
        "must be 1 with distill_teacher=mixture, of which probabilities are stored"
    yield not c.ema_decay or c.restart != "none" or c.cycles == 1, "ema_decay", \
        "would disturb the one decay of restart=none: set one of them only"
    yield set(c.window_pattern) <= set("SL") and c.window_pattern, "window_pattern", "must be letters S and L, such as SSSL"
    yield c.n_layer % 2 == 0, "n_layer", f"must be even (half encoder, half decoder); try {c.n_layer + 1}"
    yield c.n_embd % c.n_head == 0, "n_embd", \
        f"must be a multiple of n_head={c.n_head}; try {(c.n_embd // c.n_head + 1) * c.n_head}"
    yield c.n_embd // c.n_head % 2 == 0, "n_head", \
        f"must leave heads of even width for the rotary embedding, n_embd={c.n_embd} does not"
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
    yield c.fitness_tokens > c.sequence_len, "fitness_tokens", f"must hold a sequence: more than sequence_len={c.sequence_len}"
    yield c.val_tokens > c.sequence_len, "val_tokens", f"must hold a sequence: more than sequence_len={c.sequence_len}"
    yield c.train_tokens > c.fitness_tokens, "train_tokens", \
        f"must be more than fitness_tokens={c.fitness_tokens}, which come from it"


WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def typed(key, value):
    """A value of the field's type: text (from the command line) is read, anything else must fit; an int is a fine float."""
    kind = OPTIONAL.get(FIELDS[key].type, FIELDS[key].type)
    if value is None and FIELDS[key].type in OPTIONAL:
        return None
    if type(value) is str and kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    elif kind is float and type(value) is int or type(value) is str and kind is not str:
        try:
            value = kind(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or value == "":
        refuse(f"{key}={value!r}: wants {WORDS[kind]}")
    return value


def known(name):
    if name in FIELDS:
        return name
    if name == "vocab_size":
        refuse("vocab_size follows from the tokenizer: set tokenizer instead")
    if name == "student":
        refuse("--student is distill.py's alone: run it there, then prior.py without it")
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    refuse(f"unknown config name '{name}'" + (f": did you mean '{near[0]}'?" if near else "; config.py lists the known ones"))


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
    return {k: v for k, v in names.items() if not k.startswith("_")}


def action(arg, default):
    """The value of --name=value, of the default's type; of --name, where that is False: a flag."""
    name, equals, text = arg[2:].partition("=")
    if default is False:
        return True if not equals else refuse(f"{arg}: write --{name} alone")
    if not equals or text == default == "":
        refuse(f"{arg} has no value: write --{name}=VALUE")
    try:
        return type(default)(text)
    except ValueError:
        refuse(f"{name}={text!r}: wants a value such as {default!r}")


def take_actions(argv, **defaults):
    """
    (values, the rest of argv) of the --name=value that one script alone knows and that no run remembers, each of its
    default's type. Exits with code 2 on a value of another type.
    """
    values, rest = dict(defaults), []
    for arg in sys.argv[1:] if argv is None else argv:
        name = arg[2:].partition("=")[0]
        if arg.startswith("--") and name in defaults:
            values[name] = action(arg, defaults[name])
        else:
            rest.append(arg)
    return SimpleNamespace(**values), rest


def recipe(epochs):
    """
    How the paper spends a budget of epochs (section 5, measured regimes): name -> value. Below 8: one trajectory, one
    decay (its rates are ours, the paper names none), four snapshots on its last epoch. Else cycles of two epochs.
    """
    if epochs < 8:
        before = epochs - 1 if epochs > 1 else 0.85
        gap = (epochs - before) / 4
        return dict(trajectories=1, cycles=4, epochs_per_cycle=gap, first_cycle_epochs=before + gap, restart="none",
                    distill_from=4, batch_tokens_ends=None)
    trajectories = next((n for n, most in ((1, 128), (2, 256), (3, 512), (4, 1024)) if epochs <= most), 5)
    return dict(trajectories=trajectories, cycles=epochs // (2 * trajectories), epochs_per_cycle=2.0,
                first_cycle_epochs=None, restart="noise")


def from_args(argv, usage):
    """
    The checked Config of a command line `CONFIG [--name=value ...]` (argv None: the process's own); --epochs=E stands
    for the values of recipe(E). usage is the script's docstring, printed by --help. Exits with code 2 on bad input.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(usage.strip())
        raise SystemExit(0)
    options, argv = take_actions(argv, epochs="")
    paths = [a for a in argv if not a.startswith("--")]
    if len(paths) != 1:
        refuse(f"want one config file, such as configs/tiny.py, got {' '.join(paths) or 'none'}; "
               "overrides are written --name=value")
    given = {}
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            known(name)
            if not equals:
                refuse(f"{arg} has no value: write --{name}=VALUE")
            given[name] = typed(name, value)
    values = {known(k): typed(k, v) for k, v in read_file(paths[0]).items()} | given
    budget = options.epochs
    if budget:
        if not budget.isdecimal() or len(budget) > 6 or not 0 < int(budget) <= 100_000:
            refuse(f"epochs={budget!r}: no recipe fits it; "
                   "wants a whole number from 1 to 100,000, over all trajectories together")
        if values.get("schedule", "cycle") != "cycle":
            refuse(f"epochs={budget}: the recipe is one of schedule=cycle, "
                   f"this config has schedule={values['schedule']}; set its epochs_per_cycle")
        chosen = recipe(int(budget))
        if chosen.keys() & given.keys():
            refuse(f"epochs={budget} already chooses {', '.join(sorted(chosen.keys() & given.keys()))}: give one or the other")
        values |= chosen
    missing = [k for k, f in FIELDS.items() if k not in values and f.default is dataclasses.MISSING]
    if missing:
        refuse(f"config {paths[0]} does not set {', '.join(missing)}; configs/tiny.py is an example")
    config = Config(**values)
    for holds, key, mend in rules(config):
        if not holds:
            refuse(f"{key}={getattr(config, key)!r}: {mend}")
    return config
