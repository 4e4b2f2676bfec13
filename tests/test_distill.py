"""Who teaches: the distilled loss against a float64 formula, the chain, a student of K members."""
import math
import re
import shutil

import pytest
import torch

import distill
import prior
import train
from data import loader
from infra.config import from_args, student_of
from infra.files import read_json, write_json
from infra.run_directory import RunDirectory
from model import GPT
from optim import MuonAdamW
from tests.conftest import moving, population_of, read, tree
from tools import plot


@pytest.mark.parametrize("weights, temperature", [([1.0], 1.3), ([0.6, 0.1, 0.3], 1.0), ([0.5, 0.5], 1.3)])
def test_the_loss_of_several_teachers_in_float64(weights, temperature, micro, monkeypatch):
    """(1 - alpha) x labels + alpha x T^2 x KL to the softened mean of the teachers, over all tokens."""
    monkeypatch.setattr("model.CHUNK_BYTES", dict(cpu=40 * 320 * 4))         # several chunks
    config = from_args(micro(dropout=0), "")[0]
    torch.manual_seed(0)
    student, *teachers = (GPT(config).init_weights() for _ in range(1 + len(weights)))
    for model in (student, *teachers):
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.2)
    batch = torch.randint(257, (3, 33))
    teachers = [(teacher.eval(), w) for teacher, w in zip(teachers, weights)]
    loss = distill.distilled_loss(student, teachers, batch, 0.7, temperature)
    p = sum(w * teacher(batch[:, :-1]).double().softmax(-1) for teacher, w in teachers)
    p = (p.log() / temperature).softmax(-1)
    q = (student(batch[:, :-1]).double() / temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean() * temperature ** 2
    wanted = 0.3 * train.label_loss(student, batch) + 0.7 * kl
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and kl > 0.1
    gradient, wanted = (torch.autograd.grad(x, student.lm_head.weight)[0] for x in (loss, wanted))
    assert torch.allclose(gradient, wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------------ chains

def test_the_teacher_is_the_frozen_predecessor(ready, monkeypatch, watch):
    taught = watch(distill, "distilled_loss", lambda student, teachers, batch, *settings: (
        teachers[0][0].lm_head.weight.clone(), len(teachers), teachers[0][1], teachers[0][0].training,
        teachers[0][0].lm_head.weight.requires_grad, *settings))
    argv = ready(trajectories=1, distill_alpha=0.3, distill_temperature=1.7)
    train.main(argv)
    config, data, run = population_of(argv)
    assert not taught and run.members() == [(0, 0), (0, 1)]             # the first cycles have none
    distill.main(argv)
    cycles = [step.cycle for step in train.schedule(config, data.sequences_per_epoch) if step.cycle >= 2]
    assert len(taught) == 2 * len(cycles) > 8                           # of two micro-batches each
    for i, (weight, *rest) in enumerate(taught):
        assert torch.equal(weight, run.load_member(0, cycles[i // 2] - 1)[0]["lm_head.weight"].float())
        assert rest == [1, 1.0, False, False, 0.3, 1.7]
    monkeypatch.setattr(distill, "teacher_of", lambda run, t, cycle: cycle)
    with pytest.raises(AssertionError, match="cycle 2 cannot teach cycle 2"):
        distill.ChainLoss()(run, 0, 2, torch.device("cpu"))


def test_fresh_cycles_are_models_of_their_own_and_averages(ready, tmp_path, monkeypatch, refused):
    """
    The second cycle by hand, from labels alone: weights, optimizer, momentum and average begin anew; and go
    on where the scripts die after a checkpoint inside a cycle, the second one's inside its average.
    """
    L = 30                              # steps: of the last tenth, every second one joins the average
    settings = dict(trajectories=1, cycles=2, distill_from=1, distill_alpha=0, restart="fresh", ema_share=0.4,
                    schedule="warmdown", momentum_warmup=40, ema_decay=0.75, resume_every=29,
                    epochs_per_cycle=L * 4 / population_of(ready())[1].sequences_per_epoch)

    def dies(run, t, tensors, step, environment, save=RunDirectory.save_checkpoint):
        save(run, t, tensors, step, environment)
        if step % 29 == 0:
            raise EOFError
    monkeypatch.setattr(RunDirectory, "save_checkpoint", dies)
    argv = ready(**settings, ema_every=2)
    for script in (train, distill):
        with pytest.raises(EOFError):
            script.main(argv)
        script.main(argv)
    config, data, run = population_of(argv)
    model = GPT(config).train()
    torch.manual_seed(train.noise_seed(42, 1))
    model.init_weights()
    optimizer = MuonAdamW(model.named_parameters(), config.lr_scale, momentum_warmup=40)
    batches, kept = loader.Batches(data, 32, 42), []
    batches.position = 4 * L
    for s in range(L):
        train.seed_dropout(42, L + s, 0)
        train.train_step(model, optimizer, batches.take(4).split(2), train.label_loss,
                         train.rate_multipliers("warmdown", s, L))
        kept.append({n: w.clone() for n, w in model.state_dict().items()})
    member, checkpoint = run.load_member(0, 1), moving(run.load_checkpoint(0)[0])
    for n, last in kept[-1].items():
        expected = 0.6 * last + 0.4 * (0.75 * kept[L - 3][n] + 0.25 * last)
        assert torch.allclose(checkpoint[n], expected, atol=1e-6), n
        assert torch.equal(checkpoint[n].bfloat16(), member[0][n]), n
    model.load_state_dict(member[0])
    assert -loader.score(model, data.fit, 2).mean() == pytest.approx(member[1]["fit_loss"], abs=1e-3)
    other = ready(**settings, ema_every=3, run_dir=tmp_path / "other")
    assert "ema_every=3" in refused(train.main, other) and not (tmp_path / "other").exists()


def test_a_trajectory_trained_elsewhere_joins(ready, tmp_path, capsys, refused):
    """Of machines that share no disk each trains one, seed + 1 the next; copied together: one population."""
    settings = dict(cycles=2, distill_from=1, epochs_per_cycle=0.3)
    together, alone, first = (ready(**settings, run_dir=tmp_path / name, **changes) for name, changes in (
        ("both", {}), ("second", dict(seed=43, trajectories=1)), ("first", dict(trajectories=1))))
    for argv in (together, alone, first):
        for script in (train, distill, prior):
            script.main(argv)
    for path in (tmp_path / "second" / "scores").glob("*/00_*"):         # its scores are not made again
        shutil.copy(path, tmp_path / "first" / "scores" / path.parent.name / path.name.replace("00_", "01_"))
    for t in (1, 2):
        shutil.copytree(tmp_path / "second" / "trajectory_00", tmp_path / "first" / f"trajectory_0{t}")
    capsys.readouterr()
    prior.main([*first, "--trajectories=2"])
    assert "scoring" not in capsys.readouterr().err
    one, two = (read_json(tmp_path / name / "prior.json") for name in ("both", "first"))
    assert one["members"] == two["members"] and one["answers"] == two["answers"]
    assert len({m["weights_sha256"] for m in one["members"]}) == 4      # no two seeds draw the same
    assert "seed is 43 there and 44 here" in refused(prior.main, [*first, "--trajectories=3"])


# ------------------------------------------------------------------------------------------- the student

@pytest.fixture
def population_to_teach(population, tmp_path):
    """Arguments of a copy of the population, without its student."""
    folder, argv = population
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("student"))
    return [*argv, f"--run_dir={tmp_path / 'run'}"]


def test_a_student_of_K_members(population_to_teach, tmp_path, capsys, watch):
    """Its teachers are prior.json's answer with its weights; it starts from the best, on one cosine."""
    argv, path = [*population_to_teach, "--student"], tmp_path / "run" / "prior.json"
    before, result, run = path.read_bytes(), read_json(path), population_of(population_to_teach)[2]

    def answer(rule, K):
        found = next(a for a in result["answers"] if (a["rule"], a["K"]) == (rule, K))
        chosen = [(result["members"][i], w) for i, w in zip(found["members"], found["weights"]) if w > 0]
        return [(run.load_member(m["trajectory"], m["cycle"])[0], w) for m, w in chosen]
    taught = watch(distill, "distilled_loss", lambda model, teachers, batch, *settings: (
        [(teacher.lm_head.weight.clone(), w) for teacher, w in teachers], *settings))
    steps = watch(train, "train_step", lambda model, *args: (
        args[-1], model.config.dropout, {n: w.clone() for n, w in model.state_dict().items()}))
    distill.main(argv)
    assert re.search(r"next: \S*python\S* prior.py .*--student", capsys.readouterr().out)
    for teachers, *settings in taught:
        assert settings == [0.85, 1.0] and len(teachers) == len(answer("learned", 4)) > 1
        for (weight, w), (member, wanted) in zip(teachers, answer("learned", 4)):
            assert w == wanted and torch.equal(weight, member["lm_head.weight"].float())
    assert all(torch.equal(steps[0][2][n].bfloat16(), w) for n, w in answer("best", 1)[0][0].items())
    cosine = [0.5 * (1 + math.cos(math.pi * s / len(steps))) for s in range(len(steps))]
    assert [s[:2] for s in steps] == [((pytest.approx(rate), 1.0), 0.0) for rate in cosine]
    # a population of one, which prior.py and the tools take as such; that of the teachers stays as it is
    prior.main(argv)
    own = read_json(tmp_path / "run" / "student" / "prior.json")
    about = read(tmp_path / "run" / "student" / "trajectory_00" / "cycle_000.safetensors")[1]
    assert [m["weights_sha256"] for m in own["members"]] == [about["tensors_sha256"]]
    assert own["growing"][0]["epochs"] == 0.2 and path.read_bytes() == before
    drawn = watch(plot, "draw", lambda priors, path, beside: beside)
    plot.main(population_to_teach)
    assert drawn[0]["its student"][0]["growing"][0]["epochs"] == pytest.approx(2 * 3 * 0.1 + 0.2)


def test_what_a_student_needs(population_to_teach, tmp_path, refused):
    """Its teachers as they were weighed, and afterwards the settings and teachers that it was begun with."""
    argv, path = [*population_to_teach, "--student"], tmp_path / "run" / "prior.json"
    result = read_json(path)
    of_others = [{**m, "weights_sha256": "0" * 64} for m in result["members"]]
    write_json(path, {**result, "members": of_others})
    assert "is not the member that prior.json weighed" in refused(distill.main, argv)
    assert not (tmp_path / "run" / "student").exists()
    write_json(path, result)
    line = refused(distill.main, [*argv, "--student_teachers=3"])
    assert "student_teachers=3" in line and "K = 1, 2, 4, 6" in line
    distill.main(argv)
    config, before = population_of(population_to_teach)[0], tree(tmp_path / "run" / "student")
    chosen = distill.choose_teachers(config, student_of(config))
    write_json(path, {**result, "members": of_others})
    assert distill.choose_teachers(config, student_of(config)) == chosen
    for script in (distill, prior):
        line = refused(script.main, [*argv, "--student_alpha=0.5"])
        assert "distill_alpha is 0.85 there and 0.5 here" in line
    assert "student_teachers=4, not 8" in refused(distill.main, [*argv, "--student_teachers=8"])
    distill.main(argv)                                          # done already: nothing is trained
    assert tree(tmp_path / "run" / "student") == before


def test_a_run_of_older_code_is_read(population_to_teach, tmp_path, refused):
    """It lacks the settings that came later, and had their defaults."""
    path = tmp_path / "run" / "config.json"
    config = read_json(path)
    del config["identity"]["ema_share"], config["identity"]["momentum_warmup"]
    write_json(path, config)
    prior.main(population_to_teach)
    del config["identity"]["n_layer"]                           # which has no default
    write_json(path, config)
    assert "n_layer is None there" in refused(prior.main, population_to_teach)
