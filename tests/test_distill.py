"""
Who teaches: stored probabilities against float64 formulas on all tokens, the teachers that a run has, fresh cycles, the
student.
"""
import json
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import distill
import prior
import train
import world
from config import CHOICES, from_args
from data import loader, prepare
from files import read_json, write_json, writer
from model import GPT
from optim import MuonAdamW
from population import STUDENT, Run
from tests import kill
from tests.conftest import error_line
from tools import generate, plot

# fresh models are about equally good, so that every one counts in a mixture
MIXTURE = dict(distill_teacher="mixture", packings=2, distill_temperature=1, trajectories=1, restart="fresh", momentum_warmup=3)


@pytest.fixture
def ready(micro):
    def argv(**overrides):
        prepare.main(micro(**overrides))
        return micro(**overrides)
    return argv


def population_of(argv):
    config = from_args(argv, "")
    data = loader.load(config)
    return config, data, Run(config, data.fingerprint)


def probabilities(config, run, member, sequences):
    """Of every token after every input of sequences, by a member, in float64: (n, T, V)."""
    model = GPT(config).eval()
    model.load_state_dict(run.read_member(*member)[0])
    with torch.no_grad():
        return model(torch.from_numpy(sequences[:, :-1].astype(np.int64))).double().softmax(-1)


# ------------------------------------------------------------------------------------------------ the loss

def test_the_stored_kl_is_that_of_the_tokens_kept_and_the_others_as_one():
    torch.manual_seed(0)
    logits, q = torch.randn(7, 50, requires_grad=True), torch.randn(7, 50).mul(3).double().softmax(-1)
    p, ids = q.topk(5)
    loss = distill.stored_kl(logits, p.float(), ids)
    s = logits.double().softmax(-1)
    rest = lambda x: 1 - x.gather(-1, ids).sum(-1)
    wanted = (p * (p / s.gather(-1, ids)).log()).sum() + (rest(q) * (rest(q) / rest(s)).log()).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got, = torch.autograd.grad(loss, logits)
    expected, = torch.autograd.grad(wanted, logits)
    assert torch.allclose(got, expected.float(), atol=1e-5)
    whole = (q * (q / s).log()).sum().item()
    kept = [distill.stored_kl(logits, *(x.float() if x.is_floating_point() else x for x in q.topk(k))).item()
            for k in (1, 5, 20, 49)]
    assert kept == sorted(kept) and kept[-1] == pytest.approx(whole, rel=1e-4) and kept[0] < 0.9 * whole


def test_the_newest_share_is_the_best():
    r = np.random.default_rng(0)
    old, new = (torch.from_numpy(np.log(r.uniform(0.01, 1, 500))) for _ in range(2))
    loss = lambda w: -((1 - w) * old.exp() + w * new.exp()).log().mean().item()
    grid = min(np.linspace(0, 1, 10_001), key=loss)
    assert distill.newest_share(old, new) == pytest.approx(grid, abs=1e-4) and 0.2 < grid < 0.8
    assert distill.newest_share(old, old - 1) < 1e-9 and distill.newest_share(old, old + 0.1) > 1 - 1e-9


def test_a_mixture_is_stored_as_three_members_make_it(micro, monkeypatch):
    config = from_args(micro(), "")
    sequences = np.random.default_rng(0).integers(0, 257, (5, 33))
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(GPT(config).init_weights().eval())
        with torch.no_grad():
            models[-1].lm_head.weight.normal_(0, 1)
    exact = sum(w * m(torch.from_numpy(sequences[:, :-1])).detach().double().softmax(-1)
                for w, m in zip((0.14, 0.56, 0.3), models))     # 0.7 (0.2, 0.8), 0.3
    for k, error in ((256, 1e-3), (64, 0.02)):
        monkeypatch.setattr(distill, "STORED", k)
        stored = None
        for model, share in zip(models, (1.0, 0.8, 0.3)):
            stored = distill.mix_in(model, sequences, stored, share, 2)
        p, ids = distill.unpack(stored["p"], stored["ids"])
        assert p.shape == (5, 32, k) and stored["p"].dtype == torch.float16
        assert (p - exact.gather(-1, ids)).abs().max() < error
        if k == 256:
            assert torch.equal(ids[..., :3], exact.topk(3).indices)


def test_what_a_mixture_did_not_store_is_spread_as_the_newest_member_spreads_it(micro, monkeypatch):
    monkeypatch.setattr(distill, "STORED", 64)
    config, sequences, models = from_args(micro(), ""), np.random.default_rng(0).integers(0, 257, (3, 33)), []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(GPT(config).init_weights().eval())
        with torch.no_grad():
            models[-1].lm_head.weight.normal_(0, 0.15)                  # flat: half of it is not among 64 tokens
    first = distill.mix_in(models[0], sequences, None, 1.0, 2)
    second = distill.mix_in(models[1], sequences, first, 0.3, 2)
    new = models[1](torch.from_numpy(sequences[:, :-1])).detach().double().softmax(-1)
    old = torch.zeros_like(new)
    for place in np.ndindex(3, 32):
        p, ids = (x[place] for x in distill.unpack(first["p"], first["ids"]))
        left = torch.ones(257, dtype=bool)
        left[ids] = False
        old[place][ids] = p.double()
        old[place][left] = (1 - p.double().sum()) * new[place][left] / new[place][left].sum()
        assert 0.3 < 1 - p.sum() < 0.8
    exact = 0.7 * old + 0.3 * new
    p, ids = distill.unpack(second["p"], second["ids"])
    assert torch.allclose(p.double(), exact.gather(-1, ids), rtol=2e-3, atol=1e-6)
    assert torch.allclose(p.double(), exact.topk(64).values, rtol=2e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------ packings

def test_packings_come_again_and_every_sequence_has_its_number():
    r = np.random.default_rng(0)
    starts = np.cumsum([0, *r.integers(5, 90, 40)])
    tokens, starts = r.integers(0, 257, starts[-1]).astype(np.uint16), starts[:-1]
    fixed, free = (loader.Batches(tokens, starts, 16, 4, seed=7, packings=n) for n in (2, 0))
    epochs = {name: [b.take(b.per_epoch) for _ in range(5)] for name, b in (("fixed", fixed), ("free", free))}
    for name, batches in (("fixed", fixed), ("free", free)):
        for e, (rows, numbers) in enumerate(epochs[name], 1):
            packing = (1, 2, 1, 2, 1)[e - 1] if name == "fixed" else e
            text = batches.pack(packing)
            for row, number in zip(rows.numpy(), numbers.tolist()):
                assert divmod(number, len(text))[0] == packing - 1 and np.array_equal(row, text[number % len(text)])
    for e in (0, 1):
        assert torch.equal(epochs["fixed"][e][0], epochs["free"][e][0])             # the first ones are the recipe's
    assert not torch.equal(epochs["fixed"][0][1], epochs["fixed"][2][1])            # in another order
    fixed.position = fixed.per_epoch + 3                                            # and back
    assert torch.equal(fixed.take(5)[0], epochs["fixed"][1][0][3:8])


# ------------------------------------------------------------------------------------------------ teachers

def test_the_best_so_far_teaches(ready, tmp_path, monkeypatch):
    argv = ready(distill_teacher="best", cycles=5, trajectories=1)
    train.main(argv)
    config, data, run = population_of(argv)
    weights, about = run.read_member(0, 0)
    # the first is the best by far
    run.save_member(0, 0, {n: w.clone() for n, w in weights.items()}, epochs=about["epochs"], fit_loss=0.1)
    taught, original = [], distill.chain_loss
    monkeypatch.setattr(distill, "chain_loss", lambda student, teacher, *rest: (
        taught.append(teacher.lm_head.weight.clone()), original(student, teacher, *rest))[1])
    distill.main(argv)
    assert taught and all(torch.equal(w, weights["lm_head.weight"].float()) for w in taught)


def test_only_an_earlier_member_can_teach(ready, monkeypatch):
    argv = ready(trajectories=1)
    train.main(argv)
    monkeypatch.setitem(distill.TEACHERS, "predecessor", lambda config: distill.OneMember(config, lambda run, t, cycle: cycle))
    with pytest.raises(AssertionError, match="cycle 2 cannot teach cycle 2"):
        distill.main(argv)


def test_the_mixture_so_far_teaches(ready, monkeypatch):
    """
    Its stored probabilities are those of the members, mixed by the shares that the fitness set asks for, and reach the loss
    by their numbers.
    """
    argv, seen, original = ready(**MIXTURE), [], distill.stored_kl
    monkeypatch.setattr(distill, "PART", 25)                    # several files of a packing
    train.main(argv)
    monkeypatch.setattr(distill, "stored_kl", lambda logits, p, ids: (
        seen.append((p.clone(), ids.clone())), original(logits, p, ids))[1])
    batches, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda model, optimizer, micro_batches, *rest: (
        batches.extend(micro_batches), step(model, optimizer, micro_batches, *rest))[1])
    distill.main(argv)
    config, data, run = population_of(argv)
    fit = [torch.from_numpy(loader.score(_model(config, run, c), data.fit, 4)).double() for c in range(3)]
    for cycle, teaches in ((2, batches[:len(batches) // 2]), (3, batches[len(batches) // 2:])):
        weights, mixed = np.ones(1), fit[0].exp()
        for c in range(1, cycle):
            grid = np.linspace(0, 1, 20_001)
            w = grid[np.argmin([-((1 - w) * mixed + w * fit[c].exp()).log().mean().item() for w in grid[::200]]) * 200]
            near = np.clip(np.linspace(w - 0.01, w + 0.01, 2001), 0, 1)
            w = min(near, key=lambda w: -((1 - w) * mixed + w * fit[c].exp()).log().mean().item())
            weights, mixed = np.append((1 - w) * weights, w), (1 - w) * mixed + w * fit[c].exp()
        for (rows, _), (p, ids) in zip(teaches, seen[:len(teaches)] if cycle == 2 else seen[len(batches) // 2:]):
            exact = sum(w * probabilities(config, run, (0, c), rows.numpy()) for c, w in enumerate(weights)).flatten(0, 1)
            assert (p - exact.gather(-1, ids)).abs().max() < 2e-3
    parts = math.ceil(
        loader.Batches(data.train, data.doc_starts, config.sequence_len, config.epoch_multiple, 0).per_packing / 25)
    kept = sorted(p.name for p in (run.path / "trajectory_00").glob("mixture_*"))
    # the newest two
    assert kept == [f"mixture_{n:03d}_{p}_{part:02d}.pt" for n in (2, 3) for p in (1, 2) for part in range(parts)] and parts > 1


def _model(config, run, c):
    model = GPT(config)
    model.load_state_dict(run.read_member(0, c)[0])
    return model


def test_two_ranks_share_the_packings(reference, tmp_path):
    folder, argv, _ = reference
    two = [*argv, f"--run_dir={tmp_path / 'two'}", "--micro_batch=1"]
    assert kill.finish(kill.start(two, tmp_path / "log", 2)) == [0, 0], (tmp_path / "log").read_text()[-2000:]
    one = [*argv, f"--run_dir={tmp_path / 'one'}", "--micro_batch=1"]
    assert kill.finish(kill.start(one, tmp_path / "log")) == [0]
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
               if '"step"' in line and "grad_norm" in line] for name in ("one", "two")]
    assert len(losses[0]) == 9 and losses[0] == pytest.approx(losses[1], rel=0.01)


# --------------------------------------------------------------------------------------- killed, damaged

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder with data, arguments, files of an uninterrupted run) of a population whose mixture teaches."""
    folder = tmp_path_factory.mktemp("mixture")
    kill.prepare(folder)
    argv = kill.arguments(folder, **MIXTURE)
    return folder, argv, kill.uninterrupted(argv, folder / "whole")


@pytest.mark.parametrize("lost", ["nothing", "the newest mixture", "all mixtures"])
def test_killed_in_a_taught_cycle_it_goes_on_bit_for_bit(lost, reference, tmp_path):
    folder, argv, whole = reference
    argv, run = [*argv, f"--run_dir={tmp_path / 'run'}"], tmp_path / "run"
    children = kill.start(argv, tmp_path / "log")
    def moment():
        while not (run / "trajectory_00" / "resume_00000008.pt").exists():
            assert kill.ended(children[0]) is None
        return True
    assert kill.kill_when(children, moment)
    mixtures = sorted((run / "trajectory_00").glob("mixture_*"))
    assert len(mixtures) == 4
    for path in mixtures[{"nothing": 4, "the newest mixture": 2, "all mixtures": 0}[lost]:]:
        path.unlink()
    assert kill.finish(kill.start(argv, tmp_path / "log")) == [0], (tmp_path / "log").read_text()[-2000:]
    assert kill.difference(whole, run) == []


@pytest.fixture
def halfway(reference, tmp_path):
    """(argv, run directory, log, files it should end with) of a run that has its last mixture, and not yet the last member."""
    folder, argv, whole = reference
    shutil.copytree(folder / "whole", tmp_path / "run")
    run = tmp_path / "run"
    shutil.rmtree(run / "scores")
    for path in (run / "prior.json", run / "trajectory_00" / "cycle_002.pt",
                 sorted((run / "trajectory_00").glob("resume_*"))[-1]):
        path.unlink()
    return [*argv, f"--run_dir={run}"], run, tmp_path / "log", whole


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_mixture_is_named_and_made_anew(halfway):
    argv, run, log, whole = halfway
    path = run / "trajectory_00" / "mixture_002_2_00.pt"
    damage(path)
    assert kill.finish(kill.start(argv, log)) == [2]
    assert "mixture_002_2_00.pt" in (err := error_line(log.read_text())) and "delete it" in err
    path.unlink()
    assert kill.finish(kill.start(argv, log)) == [0] and kill.difference(whole, run) == []


def test_any_rank_names_a_damaged_mixture(halfway):
    argv, run, log, _ = halfway
    damage(run / "trajectory_00" / "mixture_001_2_00.pt")           # the second rank's
    (run / "trajectory_00" / "mixture_002_2_00.pt").unlink()
    assert 2 in kill.finish(kill.start([*argv, "--micro_batch=1"], log, 2))
    assert (any("mixture_001_2_00.pt" in line and "delete it" in line for line in log.read_text().splitlines())
            and "Traceback" not in log.read_text())


def test_mixtures_of_others_are_made_anew(halfway):
    argv, run, log, whole = halfway
    one, two = (run / "trajectory_00" / f"mixture_002_{p}_00.pt" for p in (1, 2))
    kept = one.read_bytes(), two.read_bytes()
    one.write_bytes(kept[1])                                        # whole, and of another packing
    two.write_bytes(kept[0])
    assert kill.finish(kill.start(argv, log)) == [0] and kill.difference(whole, run) == []


def test_asked_to_stop_while_it_stores(halfway):
    argv, run, log, whole = halfway
    for path in (run / "trajectory_00").glob("mixture_*"):
        path.unlink()
    def asked(rank):
        mix_in = distill.mix_in
        def asking(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            return mix_in(*args)
        distill.mix_in = asking
    assert (kill.finish(kill.start(argv, log, patch=asked)) == [world.STOPPED]
            and re.search(r"to go on: \S*python\S* distill.py", log.read_text()))
    assert len(list((run / "trajectory_00").glob("mixture_*"))) == 1
    assert kill.finish(kill.start(argv, log)) == [0] and kill.difference(whole, run) == []


def test_a_teacher_that_is_gone_is_named(ready, tmp_path, capsys):
    argv = ready(**MIXTURE)
    train.main(argv)
    (tmp_path / "run" / "trajectory_00" / "cycle_000.pt").unlink()
    with pytest.raises(SystemExit) as stop:
        distill.main(argv)
    assert (stop.value.code == 2 and f"cycle_000.pt is gone: restore it, or delete {tmp_path}/run/trajectory_00"
            in error_line(capsys.readouterr().err))


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
    batches = loader.Batches(data.train, data.doc_starts, 32, 4, 42)
    first, length = train.cycle_lengths(config, data.sequences_per_epoch)
    batches.position, average = 4 * first, None
    for s in range(length):
        train.seed_step(42, length + s, 0)
        train.train_step(model, optimizer, [(b,) for b in batches.take(4)[0].split(2)],
                         lambda m, b: sum(m(b[:, :-1], b[:, 1:])), train.rate_multipliers("warmdown", s, length))
        if s >= 0.9 * length:
            average = train.average_weights(average, model, 0.9)
    expected = {n: (0.6 * w + 0.4 * average[n]).bfloat16() for n, w in model.state_dict().items()}
    weights, _ = run.read_member(0, 1)
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
    optimizer.reset()
    assert optimizer.steps == 0 and not optimizer.groups[0]["m"].any()


def test_every_teacher_can_be_chosen():
    assert distill.TEACHERS.keys() == set(CHOICES["distill_teacher"])


# ------------------------------------------------------------------------------------------- the student

def student(argv, *flags):
    distill.main([*argv, "--student", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The arguments of a finished population, to be copied; noise on its members has a mixture take more than one."""
    from tests.conftest import MICRO, ROOT
    folder = tmp_path_factory.mktemp("finished")
    argv = [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in {
        **MICRO, "data_dir": folder / "data", "run_dir": folder / "run", "student_epochs": 1.0}.items())]
    torch.set_num_threads(1)
    prepare.main(argv)
    for script in (train, distill):
        script.main(argv)
    run = population_of(argv)[2]
    generator = torch.Generator().manual_seed(0)
    newest = run.read_member(0, 3)[0]
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


def test_a_student_of_the_whole_population(population_to_teach, tmp_path, monkeypatch, capsys):
    argv, before = population_to_teach, read_json(tmp_path / "run" / "prior.json")
    started, call = [], distill.Mixture.__call__
    def spy(self, launch, trajectory):
        started.append({n: w.clone() for n, w in trajectory.model.state_dict().items()})
        return call(self, launch, trajectory)
    monkeypatch.setattr(distill.Mixture, "__call__", spy)
    monkeypatch.setattr(distill, "STORED", 256)                  # these are flatter than any that has learned to read
    stored, drop = {}, Run.drop_mixtures
    monkeypatch.setattr(Run, "drop_mixtures", lambda own, t: (
        stored.update({name: w.clone() for name, w in own.read_mixture(0, len(chosen), (1, 0)).items()}), drop(own, t)))
    mixture = max((a for a in before["answers"] if a["rule"] == "learned"), key=lambda a: a["K"])
    chosen = [(before["members"][i], w) for i, w in zip(mixture["members"], mixture["weights"]) if w > 0]
    assert len(chosen) > 1
    steps, step, alphas, distilled_loss = [], train.train_step, set(), distill.distilled_loss
    monkeypatch.setattr(train, "train_step", lambda model, optimizer, batches, loss_fn, rates: (
        steps.append((rates, model.config.dropout)), step(model, optimizer, batches, loss_fn, rates))[1])
    monkeypatch.setattr(distill, "distilled_loss", lambda model, batch, alpha, *rest: (
        alphas.add(alpha), distilled_loss(model, batch, alpha, *rest))[1])
    (tmp_path / "run" / f".student.pt{writer(999999999)}").touch()      # a killed writer's
    student(argv)
    assert not [*tmp_path.glob("run/.student.pt.*"), *tmp_path.glob("run/student/*/mixture_*")]
    out = capsys.readouterr().out
    assert (re.search(r"next: \S*python\S* prior.py", out)
            and f"{len(chosen)} members with weight, of {len(before['members'])} (of 2 x 4), from best" in out)
    config, data, run = population_of(argv)
    best = next(a for a in before["answers"] if a["rule"] == "best")["members"][0]
    best = before["members"][best]["trajectory"], before["members"][best]["cycle"]
    weights = run.read_member(*best)[0]
    assert all(torch.equal(started[0][n].bfloat16(), weights[n]) for n in weights)
    cosine = [0.5 * (1 + math.cos(math.pi * s / len(steps))) for s in range(len(steps))]        # to 0, without dropout
    assert steps == [((pytest.approx(lr), 1.0), 0.0) for lr in cosine] and alphas == {0.85}
    # the stored teacher is the learned prior's mixture
    batches = loader.Batches(data.train, data.doc_starts, 32, 4, 42, distill.PACKINGS)
    text = batches.pack(1)
    exact = sum(w * probabilities(config, run, (m["trajectory"], m["cycle"]), text) for m, w in chosen)
    p, ids = distill.unpack(stored["p"], stored["ids"])
    assert (p - exact.gather(-1, ids)).abs().max() < 3e-3
    # prior.py reports it, and leaves the rest as it was
    prior.main(argv)
    after = read_json(tmp_path / "run" / "prior.json")
    [row] = [a for a in after["answers"] if a["rule"] == "student"]
    assert (row["K"] == 1 and row["epochs"] == 2 * 4 * 0.5 + 1.0 and row["of_this_mixture"]
            and (row["members"], row["weights"]) == ([], []))
    assert ([a for a in after["answers"] if a["rule"] != "student"] == before["answers"]
            and after["members"] == before["members"])
    model = GPT(config)
    model.load_state_dict(run.read_member(*STUDENT)[0])
    assert row["val_loss"] == pytest.approx(-loader.score(model, data.val, 4).astype(np.float64).mean(), abs=1e-6)
    assert "student" in capsys.readouterr().out
    plot.main(argv)
    generate.main([*argv, "--member=student", "--tokens=5"])
    out = capsys.readouterr().out
    assert "student: 'The " in out or 'student: "The ' in out
    monkeypatch.undo()
    changed = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.pt")}
    student(argv)                                               # done already: nothing is trained
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.pt")} == changed


def test_a_student_from_scratch_is_another_and_wants_a_folder(population_to_teach, tmp_path, capsys):
    argv = population_to_teach
    student(argv, "--student_from=scratch")
    first = population_of(argv)[2].read_member(*STUDENT)[0]
    with pytest.raises(SystemExit) as stop:
        student(argv)
    assert (stop.value.code == 2 and "student_from" in (err := error_line(capsys.readouterr().err))
            and "move it and student.pt away" in err)
    shutil.rmtree(tmp_path / "run" / "student")
    student(argv)
    assert not torch.equal(first["lm_head.weight"], population_of(argv)[2].read_member(*STUDENT)[0]["lm_head.weight"])


def test_a_student_goes_on_bit_for_bit(population_to_teach, tmp_path, monkeypatch):
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
    student(other)
    one, two = (torch.load(tmp_path / name / "student.pt") for name in ("run", "other"))
    assert all(torch.equal(w, two["tensors"][n]) for n, w in one["tensors"].items())


def test_ctrl_c_while_the_student_is_kept(population_to_teach, tmp_path, monkeypatch):
    save = Run.save_member
    def interrupted(run, t, *rest, **about):
        if (t, 0) == STUDENT:
            os.kill(os.getpid(), signal.SIGINT)
        save(run, t, *rest, **about)
    monkeypatch.setattr(Run, "save_member", interrupted)
    student(population_to_teach)
    assert population_of(population_to_teach)[2].read_member(*STUDENT)


def test_what_a_student_needs(population_to_teach, tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            student(population_to_teach, *flags)
        assert stop.value.code == 2
        return error_line(capsys.readouterr().err)
    assert "student_alpha" in refused("--student_alpha=1.5") and "student_from" in refused("--student_from=worst")
    assert "prior.py" in refused(f"--run_dir={tmp_path / 'none'}")
    member = next((tmp_path / "run" / "trajectory_00").glob("cycle_003.pt"))
    shutil.copy(member.with_name("cycle_002.pt"), member)
    assert "prior.py again" in refused() and not (tmp_path / "run" / "student").exists()


def test_a_finished_student_is_held_to_what_it_is(population_to_teach, tmp_path, capsys):
    argv, run = population_to_teach, tmp_path / "run"
    student(argv)
    prior.main(argv)
    with pytest.raises(SystemExit):
        student(argv, "--student_alpha=0.5")
    assert ("student_alpha is 0.85 there and 0.5 here" in (err := error_line(capsys.readouterr().err))
            and "move it and student.pt away" in err)
    shutil.copy(run / "trajectory_00" / "cycle_003.pt", tmp_path / "kept")
    shutil.rmtree(run / "trajectory_01")                        # another mixture: the student is an older one's
    prior.main(argv)
    assert "taught by another mixture" in capsys.readouterr().out
    [row] = [a for a in read_json(run / "prior.json")["answers"] if a["rule"] == "student"]
    assert row["of_this_mixture"] is False and row["epochs"] == 2 * 4 * 0.5 + 1.0
    with pytest.raises(SystemExit):
        student(argv)
    assert "taught_by" in error_line(capsys.readouterr().err)
    damage(run / "student.pt")
    shutil.rmtree(run / "scores")
    with pytest.raises(SystemExit) as stop:
        prior.main(argv)
    assert (stop.value.code == 2 and "student.pt" in (err := error_line(capsys.readouterr().err))
            and "distill.py --student again" in err)


def test_a_student_of_half_a_population_says_so_in_its_epochs(ready, tmp_path):
    argv = ready(student_epochs=1.0)
    train.main(argv)
    prior.main(argv)
    student(argv)
    prior.main(argv)
    assert [a["epochs"] for a in read_json(tmp_path / "run" / "prior.json")["answers"] if a["rule"] == "student"] == [
        2 * 2 * 0.5 + 1.0]


def test_a_run_of_older_code_is_read(ready, tmp_path):
    """It lacks the settings that came later, and had their defaults."""
    argv, run = ready(trajectories=1), tmp_path / "run"
    train.main(argv)
    config = read_json(run / "config.json")
    for name in ("packings", "distill_teacher", "ema_share", "momentum_warmup"):
        del config["identity"][name]
    write_json(run / "config.json", config)
    distill.main(argv)
    del config["identity"]["n_layer"]                           # which has no default
    write_json(run / "config.json", config)
    with pytest.raises(SystemExit):
        prior.main(argv)


def test_scores_whose_member_was_deleted_are_no_member(population_to_teach, tmp_path):
    shutil.rmtree(tmp_path / "run" / "trajectory_01")
    prior.main(population_to_teach)
    assert {m["trajectory"] for m in read_json(tmp_path / "run" / "prior.json")["members"]} == {0}
