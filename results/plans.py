"""What results/experiments.py runs: plans, each of variants and the differences that are asked of them."""
import dataclasses

TINY, SINGLE, ONE = "configs/tiny.py", "configs/single.py", ("--trajectories=1",)
STRONG = (*ONE, "--distill_alpha=0.7", "--distill_temperature=1")
INDEPENDENT = ("--cycles=1", "--schedule=cosine", "--distill_from=1", "--ema_decay=0.95", "--ema_every=1")
# what no config value says: one line that replaces one function of the method
BEST = ("distill.teacher_of = lambda run, t, cycle: "
        "min(range(cycle), key=lambda c: run.load_member(t, c, check=False)[1]['fit_loss'])")
SMALL = ("--data=manual", "--tokenizer=bytes", "--train_tokens=32768", "--fitness_tokens=16384",
         "--val_tokens=24576", "--epoch_multiple=8", "--n_layer=4", "--n_head=4", "--n_embd=128",
         "--sequence_len=128", "--batch_tokens=1024", "--micro_batch=2")
ENDS, LOOPS = ("--batch_tokens_ends=768",), ("--loop_start=2", "--loop_end=4")


@dataclasses.dataclass(frozen=True)
class Variant:
    label: str
    config: str = TINY
    flags: tuple = ()
    change: str = ""            # a line of Python, run before every script
    student: tuple = ()         # its flags: a student of this population, in a copy of its directory
    of: str = ""                # that population's name in the plan


RESET = ("train.Trajectory.restart = lambda self, cycle, of=train.Trajectory.restart: "
         "[of(self, cycle), setattr(self, 'optimizer', self.new_optimizer())]")


def rates(both):
    """A change of the cycle's multipliers: an expression of step, length and the method's lr and decay."""
    return ("train.rate_multipliers = lambda schedule, step, length, of=train.rate_multipliers: "
            f"(lambda lr, decay: ({both}))(*of(schedule, step, length))")


def student(of, label, population, K):
    return Variant(f"{label}: a student of K = {K}, 16 epochs", flags=population.flags,
                   change=population.change, of=of,
                   student=(f"--student_teachers={K}", "--student_epochs=16", "--student_alpha=0.85"))


def single(epochs):
    return Variant(f"one model, one cosine over {epochs} epochs", SINGLE, (f"--epochs_per_cycle={epochs}",))


def ablation(label, *flags, change=""):
    return Variant(label, flags=(*ONE, *flags), change=change)


CHAIN = Variant("the predecessor teaches, alpha 0.7, T 1", flags=STRONG)
BY_BEST = Variant("the best member so far teaches, alpha 0.7, T 1", flags=STRONG, change=BEST)
Q0_32 = Variant("q0, --epochs=32", flags=("--epochs=32",))
EMA_COSINE = (*ONE, *INDEPENDENT)
# record 11's models, but no teacher: the strongest independent models that we know
WARMDOWN = (*ONE, "--restart=fresh", "--schedule=warmdown", "--momentum_warmup=300", "--ema_decay=0.95",
            "--ema_every=5", "--ema_share=0.4")
ABLATIONS = {
    "q0_32": Q0_32,
    "decay_flat": ablation("weight decay flat, at its mean", change=rates("lr, 0.85")),
    "decay_falls": ablation("weight decay falls with the rate", change=rates("lr, 1.7 - decay")),
    "lr_cosine": ablation("rate falls by a cosine", change=rates(
        "(low := 0.08 + 0.46 * (1 + train.math.cos(train.math.pi * step / length))), "
        "0.7 + 0.3 * (1 - low) / 0.92")),
    "lr_flat": ablation("rate and decay flat, at their means", change=rates("0.54, 0.85")),
    "noise_none": ablation("no noise", change="train.noise_scale = lambda cycle, cycles: 0.0"),
    "noise_flat": ablation("noise 0.15 throughout", change="train.noise_scale = lambda cycle, cycles: 0.15"),
    "chain_none": ablation("no chain", "--distill_from=16"),
    **{f"chain_{c}": ablation(f"chain from cycle {c}", f"--distill_from={c}") for c in (1, 2, 8)},
    "chain_strong": CHAIN,
    "moments_reset": ablation("moments reset between cycles", change=RESET),
    "tau_1": ablation("32 cycles of 1 epoch", "--cycles=32", "--epochs_per_cycle=1", "--distill_from=8"),
    "tau_4": ablation("8 cycles of 4 epochs", "--cycles=8", "--epochs_per_cycle=4", "--distill_from=2"),
}
EPOCHS = {
    **{f"independent_{n}": Variant(f"{64 // n} independent models of {n} epochs", flags=(
        *INDEPENDENT, f"--trajectories={64 // n}", f"--epochs_per_cycle={n}")) for n in (8, 16, 32)},
    **{f"warmdown_{n}": Variant(f"{64 // n} independent warmdown models of {n} epochs", flags=(
        *WARMDOWN, f"--cycles={64 // n}", f"--distill_from={64 // n}", f"--epochs_per_cycle={n}"))
       for n in (8, 16, 32)},
    "one_64": Variant("one model, one cosine over 64 epochs", flags=(
        *EMA_COSINE, "--epochs_per_cycle=64")),
    "fresh_16": Variant("a chain of 4 independent models of 16 epochs", flags=(
        *STRONG, "--restart=fresh", "--cycles=4", "--epochs_per_cycle=16", *INDEPENDENT[1:])),
    **{f"q0_{E}": Variant(f"q0, --epochs={E}", flags=(f"--epochs={E}",)) for E in (8, 16, 32, 64, 128)},
    "student_48": student("q0_32", "q0, --epochs=32", Q0_32, 4),
    "two_8": Variant("2 trajectories of 8 cycles", flags=("--trajectories=2", "--cycles=8")),
    "two_16": Variant("2 trajectories of 16 cycles"),
    "two_16_no_chain": Variant("2 trajectories of 16 cycles without the chain", flags=("--distill_from=16",)),
}
RATES, RATED = (0.25, 0.5, 1, 2), ("decay_flat", "noise_none", "chain_none")
PLANS = {       # name -> ({variant's name: Variant}, [(variant, rule, variant, rule), to be subtracted])
    "demo": ({
        "tiny": Variant("2 x 16 cycles"),
        "no_chain": Variant("2 x 16 cycles without the chain", flags=("--distill_from=16",)),
        **{f"single_{epochs}": single(epochs) for epochs in (8, 16, 32)}},
        [("tiny", "learned", "no_chain", "learned"), ("tiny", "best", "no_chain", "best")]),
    "student": ({
        "chain": CHAIN, "best": BY_BEST,
        **{f"{of}_live{K}": student(of, population.label, population, K)
           for of, population in (("chain", CHAIN), ("best", BY_BEST)) for K in (4, 8)}},
        [("best", rule, "chain", rule) for rule in ("learned", "best")]
        + [(f"{of}_live{K}", "best", f"{of}_stored", "best") for of in ("chain", "best") for K in (4, 8)]),
    "baselines": ({
        "independent": Variant("8 independent models of 32 epochs",
                               flags=(*INDEPENDENT, "--trajectories=8", "--epochs_per_cycle=32")),
        "q0_256": Variant("q0, --epochs=256", flags=("--epochs=256",)),
        "e1": Variant("--epochs=1", flags=("--epochs=1",)),
        "e4": Variant("--epochs=4", flags=("--epochs=4",)),
        "e4_cycles": Variant("2 cycles of 2 epochs", flags=(*ONE, "--cycles=2")),
        "e8": Variant("--epochs=8", flags=("--epochs=8",))},
        [("q0_256", "learned", "independent", "uniform")]),
    "rehearsals": ({name: Variant(f"{name}: the large config, made small", f"configs/{name.split()[0]}.py",
                                  (*name.split()[1:], *SMALL, *flags)) for name, flags in {
        "1p8b": (*ENDS, *LOOPS, "--cycles=10", "--epochs_per_cycle=0.25"),
        "1p8b_960": (*ENDS, *LOOPS, "--cycles=10", "--epochs_per_cycle=0.25"), "1p8b_smoke": (*ENDS, *LOOPS),
        "baseline": (*LOOPS, "--epochs_per_cycle=2", "--ema_every=1"), "124m": ("--epochs_per_cycle=1",),
        "record11": (*LOOPS, "--cycles=3", "--first_cycle_epochs=2", "--epochs_per_cycle=4", "--ema_every=1"),
        "1p8b --epochs=4": LOOPS, "1p8b --epochs=1": LOOPS}.items()}, []),
    "epochs": (EPOCHS, []),
    "ablations": (ABLATIONS, [(name, rule, "q0_32", rule) for name in ABLATIONS if name != "q0_32"
                              for rule in ("learned", "best")]),
    # on a text of its own, further_text(): rates are not chosen where results are reported
    "rates": ({f"{name}_{lr}": dataclasses.replace(of, flags=(
        *of.flags, f"--lr_scale={lr}"), label=f"{of.label}, lr_scale={lr}")
        for lr in RATES for name, of in {**ABLATIONS, **EPOCHS}.items()
        if name in ("q0_32", *RATED, "q0_64", "independent_16", "warmdown_16")},
        [(f"{name}_{lr}", rule, f"q0_32_{lr}", rule) for name in RATED for lr in RATES
         for rule in ("learned", "best")]),
    "data": ({f"data_{n}_{E}": Variant(f"{n} times the text, one model, one cosine over {E} epochs", flags=(
        *EMA_COSINE, f"--epochs_per_cycle={E}", f"--train_tokens={16_384 * (n + 1)}"))
        for n, all_E in {2: (8, 16, 32), 4: (8, 16, 32), 8: (8, 16), 16: (4, 8)}.items() for E in all_E}, []),
}
