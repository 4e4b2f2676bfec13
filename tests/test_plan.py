"""The plan against the record's published counts."""
import pytest

from infra.config import from_args
from infra.distributed import can_share
from results.reproduction import FIGURES
from tests.conftest import ROOT, config_of, population_of
from tools import plan
from train import schedule

GIB = 2 ** 30
LABELS, TAUGHT = 25.5290, 33.7046           # model GFLOP per token: of a step on labels, and with a teacher


def of(name, *flags):
    config = config_of(name, *flags)
    return config, plan.meta_model(config), plan.sequences_per_epoch(config)


def test_the_records_counts():
    config, model, sequences = of("1p8b_960")
    assert sum(plan.parameters_by_part(model).values()) == 1_870_172_811 and sequences == 48_736
    for teachers, gflop in ((0, LABELS), (1, TAUGHT)):
        assert plan.step_flops(model, True, teachers) / 1e9 == pytest.approx(gflop, abs=5e-5)
    assert plan.cycles_of(config, sequences) == [
        (0, 23, 508, 393_216), (24, 71, 381, 524_288), (72, 95, 508, 393_216)]
    flops = plan.flops_of(config, model, sequences)
    assert flops["train.py"] + flops["distill.py"] == pytest.approx(3.17e21, rel=2e-3)
    config, model, sequences = of("1p8b")
    assert plan.cycles_of(config, sequences) == [
        (0, 15, 508, 393_216), (16, 47, 381, 524_288), (48, 63, 508, 393_216)]
    assert plan.flops_of(config, model, sequences)["prior.py"] == pytest.approx(1.05e19, rel=0.02)


def test_the_memory_is_the_estimate_of_the_record():
    """slowrun.md's, but heads are mixed once per layer, not per application (70 + 1); and no plain head."""
    config, model, _ = of("1p8b", "--compile=False")
    fixed, per_sequence = plan.memory_of(config, model, 1)
    head, share = "head: its gradients, a chunk", "Muon, this rank's share"
    assert plan.memory_of(config, model, 4)[0][share] * 4 == fixed[share]
    alone = plan.memory_of(*of("1p8b", "--compile=False", "--mtp_weight=0")[:2], 1)[0][head]
    assert alone == 4 * 50_304 * 2048 + plan.CHUNK_BYTES["cuda"] * (plan.HEAD + plan.HEAD_KL)
    assert fixed.pop(head) == alone + 4 * 50_304 * 2048 < 5 * GIB        # the MTP loss's gradients
    assert {part: count / GIB for part, count in fixed.items()} == pytest.approx({
        "parameters (fp32; embedding bf16)": 6.8, "gradients": 6.8, "AdamW": 1.15, share: 6.2,
        "bf16 copies of the weights": 3.5, "mixed heads' weights": 1.6 * 31 / 71, "teacher (bf16)": 3.4,
        "average of the weights (fp32)": 0}, abs=0.1)
    assert per_sequence["activations"] / GIB == pytest.approx(16.2, abs=0.05)
    fixed, per_sequence = plan.memory_of(*of("baseline")[:2], 1)
    assert fixed["average of the weights (fp32)"] == 4 * 1_870_172_811
    assert 8 < per_sequence["activations"] / GIB < 13                   # compiled, as slowrun.md estimates


@pytest.mark.parametrize("flags, on_labels, taught, without_loops", [
    ([], 16, 112, 0),
    (["--cycles=32", "--trajectories=4"], 32, 96, 0),
    (["--distill_from=64"], 128, 0, 0),
    (["--cycles=4", "--distill_from=4", "--restart=none", "--loop_from=0.5"], 4, 0, 4),
])
def test_the_cost_follows_the_settings(flags, on_labels, taught, without_loops):
    """Cycles of each kind, each of 508 or 381 steps and 199,753,728 tokens."""
    config, model, sequences = of("1p8b", *flags)
    flops = plan.flops_of(config, model, sequences)
    wanted = 1e9 * (on_labels * LABELS + taught * TAUGHT) + without_loops * plan.step_flops(model, False, 0)
    assert flops["train.py"] + flops["distill.py"] == pytest.approx(508 * 393_216 * wanted, rel=1e-5)


def test_what_is_printed(capsys):
    argv = [str(ROOT / "configs" / "1p8b.py"), "--student_teachers=5"]
    plan.main([*argv, "--mfu=0.55", "--price=2", "--ranks=8"])
    out = capsys.readouterr().out
    lines = {line[:15].strip(): line.replace(",", "").split() for line in out.splitlines()}
    for words in ("1,870,172,811", "25.5290", "33.7046", "2 x 64 = 128 members, 256 epochs", "0.2500 0.2499",
                  "508 steps of 393,216", "2 groups of 4", "teacher: from cycle 8 on", "0.0501 0.0500",
                  "128 members of 3.74 = 478.8; 5 states of 15.2", "scores 5.184", "in micro-batches of 2",
                  "80 GB, 74.0 GiB usable: micro_batch=2",
                  "3.5 for each of its K teachers; the most that fit: K=11"):
        assert words in out, words
    noise = out.split("1, 2, ...: ")[1].split("teacher")[0].split()
    assert len(noise) == 63                                     # before every cycle but the first
    hours, dollars = float(lines["in all"][4]), float(lines["in all"][6])
    assert hours == pytest.approx(53.3 * 8.462 / 8.357, rel=0.01)       # 53 h of training, and the scoring
    assert dollars == pytest.approx(hours * 8 * 2, rel=0.01)
    student = 16 * 48_736 * 2048 * (LABELS + 5 * (TAUGHT - LABELS)) * 1e9           # of 16 epochs, 5 teachers
    assert float(lines["--student of"][5]) == pytest.approx(student, rel=1e-3)
    plan.main([*argv, "--epochs=4", "--gpu_gb=24"])
    out = capsys.readouterr().out
    assert "4 epochs" in out and "none fits" in out and "noise" not in out and "the one decay" in out


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_every_config_has_a_plan(name, capsys):
    plan.main([str(ROOT / "configs" / f"{name}.py")])
    assert "members" in capsys.readouterr().out and config_of(name).run_dir == f"runs/{name}"


def test_the_published_figures_have_runs_that_start():
    for _, _, runs, _, gpus, _ in FIGURES:
        for name, flags in runs:
            config = config_of(name, *flags)
            short = any(step.first and step.last for step in schedule(config, 48_736))
            assert can_share(config, gpus) and not short, (name, flags)


def test_prepared_data_is_counted_exactly(micro, ready):
    data = population_of(ready())[1]
    assert plan.sequences_per_epoch(from_args(micro(), "")[0]) == data.sequences_per_epoch
