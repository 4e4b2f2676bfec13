"""The plan against the record's published counts, plain loops, and models that are really built."""
import pytest
import torch

from infra.config import from_args, student_of
from data import prepare
from model import GPT
from results.reproduction import FIGURES
from tests.conftest import ROOT, error_line
from tools import plan
from train import schedule
from infra.distributed import can_share


def of(name, *flags):
    config = from_args([str(ROOT / "configs" / f"{name}.py"), *flags], "")[0]
    return config, plan.meta_model(config), plan.sequences_per_epoch(config)


def gflop(model, teacher=False):
    return plan.step_flops(model, True, teacher) / 1e9


def test_the_records_counts():
    config, model, sequences = of("1p8b_960")
    assert sum(plan.parameters_by_part(model).values()) == 1_870_172_811 and sequences == 48_736
    assert gflop(model) == pytest.approx(25.5290, abs=5e-5) and gflop(model, teacher=True) == pytest.approx(33.7046, abs=5e-5)
    assert plan.cycles_of(config, sequences) == [(0, 23, 508, 393_216), (24, 71, 381, 524_288), (72, 95, 508, 393_216)]
    assert (sum(plan.flops_of(config, model, sequences).values()) - plan.flops_of(config, model, sequences)["prior.py"]
            == pytest.approx(3.17e21, rel=2e-3))
    config, model, sequences = of("1p8b")
    assert plan.cycles_of(config, sequences) == [(0, 15, 508, 393_216), (16, 47, 381, 524_288), (48, 63, 508, 393_216)]
    assert plan.flops_of(config, model, sequences)["prior.py"] == pytest.approx(1.05e19, rel=0.02)


def test_windows_against_a_loop():
    for T, window in ((8, 8), (8, 4), (7, 3), (2048, 1024)):
        pairs = sum(1 for q in range(T) for k in range(T) if 0 <= q - k <= window) if T < 10 else 768.75 * T
        assert plan.mean_keys(T, window) * T == pytest.approx(pairs)
    assert plan.mean_keys(2048, 2048) == 1024.5


def test_the_memory_is_the_estimate_of_the_record():
    """slowrun.md's, part by part; but ours mixes heads once per layer, not per application (70 + 1), and has no plain head."""
    config, model, _ = of("1p8b", "--compile=False")
    fixed, per_sequence = plan.memory_of(config, model, 1)
    GIB = 2 ** 30
    wanted = {"parameters (fp32; embedding bf16)": 6.8, "gradients": 6.8, "AdamW": 1.15, "Muon, this rank's share": 6.2,
              "bf16 copies of the weights": 3.5, "mixed heads' weights": 1.6 * 31 / 71, "teacher (bf16)": 3.4}
    head, average = fixed.pop("head: its gradients, a chunk"), fixed.pop("average of the weights (fp32)")
    assert average == 0
    assert {part: count / GIB for part, count in fixed.items()} == pytest.approx(wanted, abs=0.1)
    assert per_sequence["activations"] / GIB == pytest.approx(16.2, abs=0.05) and head < 5 * GIB
    assert fixed["mixed heads' weights"] == 2 * 3 * 2048 ** 2 * 31
    without_mtp = plan.memory_of(*of("1p8b", "--compile=False", "--mtp_weight=0")[:2], 1)[0]["head: its gradients, a chunk"]
    assert head - without_mtp == 4 * 50_304 * 2048                     # its loss has gradients of its own
    assert without_mtp == 4 * 50_304 * 2048 + plan.CHUNK_BYTES["cuda"] * (plan.HEAD + plan.HEAD_KL)
    assert plan.memory_of(config, model, 4)[0]["Muon, this rank's share"] * 4 == fixed["Muon, this rank's share"]


def test_the_model_is_counted_as_it_is(micro):
    config = from_args(micro(), "")[0]
    model = GPT(config).init_weights()
    assert sum(plan.parameters_by_part(plan.meta_model(config)).values()) == sum(p.numel() for p in model.parameters())


def test_linear_flops_against_torchs_counter(micro):
    """A forward pass at dropout 0, attention left out: the counter sees every matrix product, the head mixes' too."""
    from torch.utils.flop_counter import FlopCounterMode
    config = from_args(micro(iha=False, n_layer=4, loop_start=2, loop_end=4, loop_extra=2), "")[0]
    model = GPT(config).init_weights().eval().requires_grad_(False)
    idx = torch.randint(257, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(idx)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in counted.items() if "attention" not in op and "bmm" not in op)
    terms = plan.forward_flops(model, True, mtp=False)
    saved = 2 * sum(p.numel() for p in model.ve_projs["3"].parameters()) * 2        # computed once, not three times
    assert linear == 64 * (terms["layers"] + terms["value embeddings"] + terms["head"] - saved)


def test_attention_flops_against_torchs_counter(micro):
    """As plain products torch counts T x T; of these a token attends to the pairs of its window."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config = from_args(micro(iha=False, n_layer=4, window_pattern="SL"), "")[0]
    model, T = GPT(config).init_weights().eval().requires_grad_(False), 32
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randint(257, (2, T)))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert counted == 4 * (2 * 2 * T * T * config.n_embd) * 2           # four layers, QK' and PV, two sequences
    pairs = lambda window: sum(1 for q in range(T) for k in range(T) if 0 <= q - k <= window)
    attended = counted * (2 * pairs(T) + 2 * pairs(T // 2)) / (4 * T * T)
    assert plan.forward_flops(model, True, mtp=False)["attention"] * 2 * T == pytest.approx(attended)


@pytest.mark.parametrize("flags, change", [
    (["--n_embd=1024", "--n_head=8"], lambda p, o: p["gflop"] < o["gflop"] / 3 and p["members"] == o["members"]),
    (["--cycles=32"], lambda p, o: p["flops"] / o["flops"] == pytest.approx(
        (8 * 25.529 + 24 * 33.7046) / (8 * 25.529 + 56 * 33.7046), rel=1e-3) and p["gflop"] == o["gflop"]),
    (["--trajectories=4"], lambda p, o: p["flops"] == pytest.approx(2 * o["flops"]) and p["members"] == 2 * o["members"]),
    (["--distill_from=64"], lambda p, o: p["flops"] / o["flops"] == pytest.approx(
        64 * 25.529 / (8 * 25.529 + 56 * 33.7046), rel=1e-3)),
    (["--loop_from=0.5"], lambda p, o: p["gflop"] == o["gflop"] and 0.7 * o["flops"] < p["flops"] < 0.85 * o["flops"]),
])
def test_the_figures_follow_overrides(flags, change):
    def figures(*flags):
        config, model, sequences = of("1p8b", *flags)
        flops = plan.flops_of(config, model, sequences)
        return dict(gflop=gflop(model), flops=flops["train.py"] + flops["distill.py"],
                    members=config.trajectories * config.cycles)
    assert change(figures(*flags), figures())


def test_a_student_costs_its_steps_and_a_pass_of_every_teacher(capsys):
    config, model, sequences = of("1p8b", "--student_epochs=6", "--cycles=4")
    tokens = sequences * 2048
    wanted = 6 * tokens * (25.5290e9 + 5 * (33.7046e9 - 25.5290e9))
    assert plan.flops_of(student_of(config), model, sequences, 5)["distill.py"] == pytest.approx(wanted, rel=1e-3)
    plan.main([str(ROOT / "configs" / "1p8b.py"), "--student_epochs=6", "--cycles=4"])
    [flops] = [float(line.split()[5]) for line in capsys.readouterr().out.splitlines()
               if line.startswith("  --student of 4, 6 epochs")]
    assert flops == pytest.approx(wanted * (25.5290 + 4 * 8.1756) / (25.5290 + 5 * 8.1756), rel=1e-3)


def test_what_is_printed(capsys):
    plan.main([str(ROOT / "configs" / "1p8b.py"), "--mfu=0.55", "--price=2", "--ranks=8"])
    out = capsys.readouterr().out
    for words in ("1,870,172,811", "25.5290", "33.7046", "2 x 64 = 128 members, 256 epochs", "508 steps of 393,216",
                  "2 groups of 4", "the predecessor, from cycle 8", "128 members of 3.74 = 478.8; 5 states of 15.2",
                  "scores 5.184", "in micro-batches of 2", "80 GB, 74.0 GiB usable: micro_batch=2", "3.5 for each of its K teachers; the most that fit: K=11", "0.2500 0.2499", "0.0501 0.0500"):
        assert words in out, words
    assert len(out.split("1, 2, ...: ")[1].split("teacher")[0].split()) == 63       # noise before every cycle but the first
    [hours] = [float(line.split()[4]) for line in out.splitlines() if line.startswith("  in all")]
    assert hours == pytest.approx(53.3 * 8.462 / 8.357, rel=0.01)       # 53 h of training at 55 % of the peak, and the scoring
    [dollars] = [float(line.split()[6].replace(",", "")) for line in out.splitlines() if line.startswith("  in all")]
    assert dollars == pytest.approx(hours * 8 * 2, rel=0.01)
    plan.main([str(ROOT / "configs" / "1p8b.py"), "--epochs=4", "--gpu_gb=24"])
    out = capsys.readouterr().out
    assert "4 epochs" in out and "none fits" in out and "noise" not in out and "the one decay" in out


@pytest.mark.parametrize("config", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_every_config_has_a_plan(config, capsys):
    plan.main([str(ROOT / "configs" / f"{config}.py")])
    assert "members" in capsys.readouterr().out


def test_the_published_figures_have_runs_that_start():
    for _, _, runs, _, gpus, _ in FIGURES:
        for name, flags in runs:
            config = from_args([str(ROOT / "configs" / f"{name}.py"), *flags], "")[0]
            steps = schedule(config, 48_736)
            assert can_share(config, gpus) and not any(step.first and step.last for step in steps), (name, flags)


def test_looping_is_counted_by_decay_and_the_average_weighs():
    config, model, sequences = of("1p8b", "--cycles=4", "--distill_from=4", "--restart=none", "--loop_from=0.5",
                                  "--batch_tokens_ends=524288")
    flops = plan.flops_of(config, model, sequences)["train.py"]
    halves = [plan.step_flops(model, looping, 0) for looping in (False, True)]
    assert flops == pytest.approx(2 * 4 * 381 * 524_288 * sum(halves) / 2, rel=1e-6)
    config, model, _ = of("baseline")
    assert plan.memory_of(config, model, 1)[0]["average of the weights (fp32)"] == 4 * 1_870_172_811
    per_sequence = plan.memory_of(config, model, 1)[1]["activations"]
    assert 8 < per_sequence / 2 ** 30 < 13                      # compiled, as slowrun.md estimates


def test_prepared_data_is_counted_exactly(micro):
    argv = micro()
    estimate = plan.sequences_per_epoch(from_args(argv, "")[0])
    prepare.main(argv)
    from data import loader
    assert plan.sequences_per_epoch(from_args(argv, "")[0]) == loader.load(from_args(argv, "")[0]).sequences_per_epoch <= estimate


@pytest.mark.parametrize("flag, names", [
    ("--ranks=-1", ["ranks"]),
    ("--ranks", ["--ranks=VALUE"]),
    ("--ranks=7", ["ranks=7", "--ranks=4"]),
    ("--mfu=1.5", ["mfu"]),
    ("--price=-1", ["price"]),
    ("--ranks=x", ["ranks"]),
    ("--train_tokens=140000", ["train_tokens=140000", "epoch_multiple=16"]),
])
def test_bad_flags(flag, names, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main([str(ROOT / "configs" / "1p8b.py"), flag])
    err = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(name in err for name in names)
