"""
Who teaches: the distilled loss against a float64 formula on all tokens, the chain, fresh cycles, the student of K members.
"""
import collections
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distill
import prior
import train
from infra.config import from_args
from data import loader, prepare
from infra.files import read_json, write_json
from model import GPT
from optim import MuonAdamW
from infra.run_directory import RunDirectory
from tests.conftest import MICRO, ROOT, error_line
from tools import generate, plot


@pytest.fixture
def ready(micro):
    def argv(**overrides):
        prepare.main(micro(**overrides))
        return micro(**overrides)
    return argv


def population_of(argv):
    config = from_args(argv, "")[0]
    data = loader.load(config)
    return config, data, RunDirectory(config, data.fingerprint)


# ------------------------------------------------------------------------------------------------ the loss

@pytest.mark.parametrize("weights, temperature", [([1.0], 1.3), ([0.6, 0.1, 0.3], 1.0), ([0.5, 0.5], 1.3)])
def test_the_loss_of_several_teachers_in_float64(weights, temperature, micro, monkeypatch):
    """(1 - alpha) x labels + alpha x T^2 x KL to the softened mean of the teachers' probabilities, over all tokens."""
    monkeypatch.setattr("model.CHUNK_BYTES", dict(cpu=40 * 320 * 4))         # several chunks
    config = from_args(micro(dropout=0), "")[0]
    torch.manual_seed(0)
    student, *teachers = (GPT(config).init_weights() for _ in range(1 + len(weights)))
    for model in (student, *teachers):
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.2)
    batch = torch.randint(257, (3, 33))
    loss = distill.distilled_loss(student, [(t.eval(), w) for t, w in zip(teachers, weights)], batch, 0.7, temperature)
    p = sum(w * t(batch[:, :-1]).double().softmax(-1) for t, w in zip(teachers, weights))
    p = (p.log() / temperature).softmax(-1)
    q = (student(batch[:, :-1]).double() / temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean() * temperature ** 2
    assert loss.item() == pytest.approx((0.3 * train.label_loss(student, batch) + 0.7 * kl).item(), rel=1e-5) and kl > 0.1
    wanted = torch.autograd.grad(0.3 * train.label_loss(student, batch) + 0.7 * kl, student.lm_head.weight)[0]
    assert torch.allclose(torch.autograd.grad(loss, student.lm_head.weight)[0], wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the chain

def test_another_member_can_be_made_the_teacher(ready, monkeypatch):
    """By replacing one function; but only an earlier one can teach."""
    argv, taught, original = ready(trajectories=1), [], distill.distilled_loss
    train.main(argv)
    run = population_of(argv)[2]
    monkeypatch.setattr(distill, "teacher_of", lambda run, t, cycle: 0)
    monkeypatch.setattr(distill, "distilled_loss", lambda student, teachers, *rest: (
        taught.append(teachers[0][0].lm_head.weight.clone()), original(student, teachers, *rest))[1])
    distill.main(argv)
    first = run.load_member(0, 0)[0]["lm_head.weight"].float()
    assert taught and all(torch.equal(w, first) for w in taught)
    monkeypatch.setattr(distill, "teacher_of", lambda run, t, cycle: cycle)
    shutil.rmtree(run.path)
    train.main(argv)
    with pytest.raises(AssertionError, match="cycle 2 cannot teach cycle 2"):
        distill.main(argv)


def test_a_teacher_that_is_gone_is_named(ready, tmp_path, capsys):
    argv = ready(trajectories=1)
    train.main(argv)
    (tmp_path / "run" / "trajectory_00" / "cycle_001.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        distill.main(argv)
    assert (stop.value.code == 2 and "cycle_001.safetensors' is not readable (FileNotFoundError): restore it" in error_line(capsys.readouterr().err))


# --------------------------------------------------------------------------------- chains of fresh models

def test_fresh_cycles_are_models_of_their_own(ready, tmp_path):
    argv = ready(restart="fresh", schedule="warmdown", momentum_warmup=3, ema_decay=0.9, ema_every=1, ema_share=0.4,
                 trajectories=1, cycles=2, distill_from=1, epochs_per_cycle=3, distill_alpha=0)
    train.main(argv)
    distill.main(argv)
    config, data, run = population_of(argv)
    model = GPT(config).train()                                 # the second cycle, by hand: with alpha = 0 labels alone
    torch.manual_seed(train.noise_seed(42, 1))
    model.init_weights()
    optimizer = MuonAdamW(model.named_parameters(), config.lr_scale, momentum_warmup=3)
    batches = loader.Batches(data, 32, 42)
    first, length = collections.Counter(step.cycle for step in train.schedule(config, data.sequences_per_epoch)).values()
    batches.position, average = 4 * first, None
    for s in range(length):
        train.seed_dropout(42, length + s, 0)
        train.train_step(model, optimizer, batches.take(4).split(2),
                         lambda m, b: sum(m(b[:, :-1], b[:, 1:])), train.rate_multipliers("warmdown", s, length))
        if s >= 0.9 * length:
            weights = {n: w.detach().clone() for n, w in model.state_dict().items()}
            average = weights if average is None else {n: 0.9 * average[n] + 0.1 * w for n, w in weights.items()}
    expected = {n: (0.6 * w + 0.4 * average[n]).bfloat16() for n, w in model.state_dict().items()}
    weights, _ = run.load_member(0, 1)
    assert all(torch.allclose(weights[n].float(), expected[n].float(), rtol=2e-2, atol=2e-3) for n in expected)


def test_warmdown_and_the_momentum():
    assert [train.rate_multipliers("warmdown", s, 10) for s in (0, 7, 8, 9)] == [
        (1, 1), (1, 1), (pytest.approx(1), 1), (pytest.approx(0.5), 1)]
    p = torch.nn.Parameter(torch.eye(3))
    optimizer, moments = MuonAdamW([("w", p)], 1.0, momentum_warmup=4), []
    for g in (1.0, 1.0, 1.0, 1.0, 1.0):
        p.grad = torch.full((3, 3), g)
        optimizer.step(1, 1)
        moments.append(optimizer.groups[0]["m"][0, 0, 0].item())
    expected, m = [], 0.0
    for momentum in (0.85, 0.875, 0.9, 0.925, 0.95):
        m = momentum * m + 1 - momentum
        expected.append(m)
    assert moments == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------- the student

def student(argv, *flags):
    distill.main([*argv, "--student", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The arguments of a finished population, to be copied; noise on its members has a mixture take more than one."""
    folder = tmp_path_factory.mktemp("finished")
    argv = [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in {
        **MICRO, "data_dir": folder / "data", "run_dir": folder / "run", "student_epochs": 1.0}.items())]
    torch.set_num_threads(1)
    prepare.main(argv)
    for script in (train, distill):
        script.main(argv)
    run = population_of(argv)[2]
    generator = torch.Generator().manual_seed(0)
    newest = run.load_member(0, 3)[0]
    for member in run.members():
        noisy = {n: w + torch.randn(w.shape, generator=generator) * (0.3 if n == "lm_head.weight" else 0)
                 for n, w in newest.items()}
        run.save_member(*member, noisy, epochs=1.0, fit_loss=5.0)
    prior.main(argv)
    return folder, argv


@pytest.fixture
def population_to_teach(finished, tmp_path):
    folder, argv = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    return [*argv, f"--run_dir={tmp_path / 'run'}"]


def test_a_student_of_K_members(population_to_teach, tmp_path, monkeypatch, capsys):
    argv, before = population_to_teach, (tmp_path / "run" / "prior.json").read_bytes()
    result = read_json(tmp_path / "run" / "prior.json")
    answer = next(a for a in result["answers"] if (a["rule"], a["K"]) == ("learned", 4))
    chosen = [(result["members"][i], w) for i, w in zip(answer["members"], answer["weights"]) if w > 0]
    assert len(chosen) > 1
    run, seen, steps = population_of(argv)[2], [], []
    step, distilled_loss = train.train_step, distill.distilled_loss
    def spy(model, teachers, batch, alpha, temperature):
        seen.append([(teacher.lm_head.weight.clone(), w) for teacher, w in teachers] + [alpha, temperature])
        return distilled_loss(model, teachers, batch, alpha, temperature)
    def record(model, optimizer, batches, loss_fn, rates):
        steps.append((rates, model.config.dropout, {n: w.clone() for n, w in model.state_dict().items()}))
        return step(model, optimizer, batches, loss_fn, rates)
    monkeypatch.setattr(distill, "distilled_loss", spy)
    monkeypatch.setattr(train, "train_step", record)
    student(argv)
    assert re.search(r"next: \S*python\S* prior.py .*--student", capsys.readouterr().out)
    for *teachers, alpha, temperature in seen:
        assert (alpha, temperature, len(teachers)) == (0.85, 1.0, len(chosen))
        for (weight, w), (m, wanted) in zip(teachers, chosen):
            assert w == wanted and torch.equal(weight, run.load_member(m["trajectory"], m["cycle"])[0]["lm_head.weight"].float())
    best = result["members"][next(a for a in result["answers"] if a["rule"] == "best")["members"][0]]
    first = run.load_member(best["trajectory"], best["cycle"])[0]
    assert all(torch.equal(steps[0][2][n].bfloat16(), w) for n, w in first.items())         # from the best member on
    cosine = [0.5 * (1 + math.cos(math.pi * s / len(steps))) for s in range(len(steps))]     # to 0, without dropout
    assert [s[:2] for s in steps] == [((pytest.approx(lr), 1.0), 0.0) for lr in cosine]
    # a population of one, which prior.py and the tools take as such; that of the teachers stays as it is
    prior.main([*argv, "--student"])
    own = read_json(tmp_path / "run" / "student" / "prior.json")
    assert (len(own["members"]), own["growing"][0]["epochs"]) == (1, 1.0)
    config, data, _ = population_of(argv)
    model = GPT(config)
    model.load_state_dict(load_file(tmp_path / "run" / "student" / "trajectory_00" / "cycle_000.safetensors"))
    assert own["members"][0]["val_loss"] == pytest.approx(-loader.score(model, data.val, 4).astype(np.float64).mean(), abs=1e-6)
    assert (tmp_path / "run" / "prior.json").read_bytes() == before
    drawn, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda priors, path, beside: (drawn.append(beside), draw(priors, path, beside)))
    plot.main(argv)
    assert drawn[0]["its student"][0]["growing"][0]["epochs"] == 2 * 4 * 0.5 + 1.0
    capsys.readouterr()
    generate.main([*argv, "--student", "--tokens=5"])
    assert re.match("student: ['\"]The ", capsys.readouterr().out)
    monkeypatch.undo()
    changed = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    student(argv)                                               # done already: nothing is trained
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")} == changed


def test_a_student_goes_on_bit_for_bit(population_to_teach, tmp_path, monkeypatch):
    """Whatever prior.json says meanwhile."""
    argv = population_to_teach
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    student(argv)
    other = [*argv, f"--run_dir={tmp_path / 'other'}", "--resume_every=2"]
    step, calls = train.train_step, []
    def stops(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(SystemExit):
        student(other)
    monkeypatch.undo()
    changed = read_json(tmp_path / "other" / "prior.json")
    for a in changed["answers"]:
        a["members"] = a["members"][::-1]
    write_json(tmp_path / "other" / "prior.json", changed)
    student(other)
    one, two = (load_file(tmp_path / name / "student" / "trajectory_00" / "cycle_000.safetensors") for name in ("run", "other"))
    assert all(torch.equal(w, two[n]) for n, w in one.items())


def test_what_a_student_needs(population_to_teach, tmp_path, capsys):
    def refused(*flags, script=distill):
        with pytest.raises(SystemExit) as stop:
            script.main([*population_to_teach, "--student", *flags])
        assert stop.value.code == 2
        return error_line(capsys.readouterr().err)
    assert "student_alpha" in refused("--student_alpha=1.5")
    assert "prior.py" in refused(f"--run_dir={tmp_path / 'none'}")
    assert "student_teachers=3" in (err := refused("--student_teachers=3")) and "K = 1, 2, 4, 8" in err
    assert "no members" in refused(script=prior)
    member = tmp_path / "run" / "trajectory_00" / "cycle_003.safetensors"
    kept = member.read_bytes()
    for path in (tmp_path / "run").glob("trajectory_*/cycle_*.safetensors"):         # none is what was weighed
        shutil.copy(path, path.with_suffix(".kept"))
    members = sorted((tmp_path / "run").glob("trajectory_*/cycle_*.safetensors"))
    for path, other in zip(members, members[1:] + members[:1]):
        shutil.copy(other.with_suffix(".kept"), path)
    err = refused()
    assert "cycle_" in err and not (tmp_path / "run" / "student").exists()
    for path in members:
        path.with_suffix(".kept").rename(path)
    assert member.read_bytes() == kept
    student(population_to_teach)
    assert "distill_alpha is 0.85 there and 0.5 here" in refused("--student_alpha=0.5")
    assert "student_teachers=4, not 8" in refused("--student_teachers=8")
    assert "distill_alpha" in refused("--student_alpha=0.5", script=prior)


# ------------------------------------------------------------------------------------ runs and trajectories

def test_a_run_of_older_code_is_read(ready, tmp_path):
    """It lacks the settings that came later, and had their defaults."""
    argv, run = ready(trajectories=1), tmp_path / "run"
    train.main(argv)
    config = read_json(run / "config.json")
    for name in ("ema_share", "momentum_warmup"):
        del config["identity"][name]
    write_json(run / "config.json", config)
    distill.main(argv)
    del config["identity"]["n_layer"]                           # which has no default
    write_json(run / "config.json", config)
    with pytest.raises(SystemExit):
        prior.main(argv)


def test_a_trajectory_trained_elsewhere_joins(ready, tmp_path, capsys):
    """Of machines that share no disk each trains one, seed + 1 the next; copied together they are one population."""
    together, alone = ready(run_dir=tmp_path / "both"), ready(run_dir=tmp_path / "second", seed=43, trajectories=1)
    for argv in (together, alone):
        for script in (train, distill, prior):
            script.main(argv)
    first = ready(run_dir=tmp_path / "first", trajectories=1)
    train.main(first)
    distill.main(first)
    shutil.copytree(tmp_path / "second" / "trajectory_00", tmp_path / "first" / "trajectory_01")
    for split in ("fit", "val"):                                # with its scores, which are not made again
        for path in (tmp_path / "second" / "scores" / split).iterdir():
            os.makedirs(tmp_path / "first" / "scores" / split, exist_ok=True)
            shutil.copy(path, tmp_path / "first" / "scores" / split / path.name.replace("00_", "01_"))
    capsys.readouterr()
    prior.main([*first, "--trajectories=2"])
    assert "4/4" in capsys.readouterr().err
    one, two = (read_json(tmp_path / name / "prior.json") for name in ("both", "first"))
    assert one["members"] == two["members"] and one["answers"] == two["answers"]
    shutil.copytree(tmp_path / "second" / "trajectory_00", tmp_path / "first" / "trajectory_02")
    with pytest.raises(SystemExit):
        prior.main([*first, "--trajectories=3"])
    assert "seed is 43 there and 44 here" in error_line(capsys.readouterr().err)


def test_scores_whose_member_was_deleted_are_no_member(population_to_teach, tmp_path):
    shutil.rmtree(tmp_path / "run" / "trajectory_01")
    prior.main(population_to_teach)
    assert {m["trajectory"] for m in read_json(tmp_path / "run" / "prior.json")["members"]} == {0}
