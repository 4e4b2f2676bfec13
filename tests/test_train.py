"""The schedules against tables written by hand, noise, one step in parts, the chain, resume, and 1 process against 2."""
import collections
import contextlib
import json
import math
import os
import random

import numpy as np
import pytest
import torch

import distill
import prior
import train
from infra.config import from_args
from data import loader, prepare
from model import GPT
from optim import MuonAdamW
from infra.files import read_json, write_whole
from infra.run_directory import RunDirectory
from tests import kill
from tests.conftest import ROOT, error_line, read
from infra.console import next_command
from infra.distributed import Ranks, can_share, join, micro_batch_size, processes

RECIPES = {name: from_args([str(ROOT / "configs" / f"{name}.py")], "")[0] for name in ("1p8b", "1p8b_960")}


def cycle_lengths(config, sequences_per_epoch):
    """Steps of every cycle."""
    return list(collections.Counter(step.cycle for step in train.schedule(config, sequences_per_epoch)).values())


def test_rates_within_a_cycle():
    # step of 4: rate 1 - 0.92 s/4; decay 0.7 + 0.3 s/4
    table = [(0, 1.0, 0.7), (1, 0.77, 0.775), (2, 0.54, 0.85), (3, 0.31, 0.925)]
    for step, lr, wd in table:
        assert train.rate_multipliers("cycle", step, 4) == pytest.approx((lr, wd), abs=1e-12)
    assert [train.rate_multipliers("cosine", s, 4) for s in (0, 2)] == [(1.0, 1.0), (pytest.approx(0.5), 1.0)]
    assert train.rate_multipliers("cosine", 4, 4)[0] == pytest.approx(0)


def test_noise_falls_by_half_a_cosine():
    assert [train.noise_scale(c, 5) for c in (1, 2, 3, 4)] == pytest.approx([0.25, 0.20, 0.10, 0.05])
    assert train.noise_scale(1, 2) == 0.25
    assert (train.noise_scale(1, 64), train.noise_scale(63, 64)) == pytest.approx((0.25, 0.05))


@pytest.mark.parametrize("name, large", [("1p8b", range(16, 48)), ("1p8b_960", range(24, 72))])
def test_the_record_batches_and_cycle_lengths(name, large):
    config = RECIPES[name]
    lengths = cycle_lengths(config, 48_736)
    for cycle in range(config.cycles):
        inside = cycle in large
        assert train.tokens_per_step(config, cycle) == (524_288 if inside else 393_216)
        assert lengths[cycle] == (381 if inside else 508)


def test_one_cycle_takes_the_middle_batch():
    config = from_args([str(ROOT / "configs" / "single.py"), "--batch_tokens_ends=512"], "")[0]
    assert train.tokens_per_step(config, 0) == 1024


def test_perturb_adds_noise_in_proportion_and_by_seed():
    model = GPT(from_args([str(ROOT / "configs" / "tiny.py")], "")[0]).init_weights()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train.perturb(model, 0.2, seed=3)
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "transformer.h.1.mlp.c_fc.weight"):
        change = model.get_parameter(name).detach() - start[name]
        assert change.std() / start[name].std() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(model.resid_lambdas, start["resid_lambdas"])         # all equal: no deviation, no noise
    again = {n: p.clone() for n, p in start.items()}
    model.load_state_dict(again)
    train.perturb(model, 0.2, seed=3)
    first = model.lm_head.weight.detach().clone()
    model.load_state_dict(again)
    train.perturb(model, 0.2, seed=4)
    assert not torch.equal(first, model.lm_head.weight)


def test_micro_batches_add_up_to_the_batch(micro):
    config = from_args(micro(dropout=0), "")[0]
    batch = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for size in (4, 2, 1):
        torch.manual_seed(0)
        model = GPT(config).init_weights().train()
        optimizer = MuonAdamW(model.named_parameters(), config.lr_scale)
        loss, norm = train.train_step(model, optimizer, batch.split(size), train.label_loss, (0.0, 0.0))
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert norm < 1 and norm.item() == pytest.approx(gradients[-1].norm().item(), rel=1e-4)
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    assert all(torch.allclose(g, gradients[0], atol=1e-5) for g in gradients)


def test_gradients_are_clipped_to_norm_1(micro):
    model = GPT(from_args(micro(dropout=0), "")[0]).init_weights().train()
    with torch.no_grad():
        model.lm_head.weight.mul_(3000)
    _, norm = train.train_step(model, MuonAdamW(model.named_parameters(), 0.25), (torch.randint(257, (4, 33)),),
                               train.label_loss, (0.0, 0.0))
    assert norm > 5 and torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() == pytest.approx(1, rel=1e-3)


def test_ranks_exchange_gradients_with_the_last_micro_batch_only():
    class Replica(torch.nn.Linear):
        waiting, calls = False, []
        @contextlib.contextmanager
        def no_sync(self):
            self.waiting = True
            yield
            self.waiting = False
        def forward(self, x):
            self.calls.append(self.waiting)
            return super().forward(x)
    model = Replica(4, 4, bias=False)
    loss_fn = lambda model, batch: model(batch).square().mean()
    train.train_step(model, MuonAdamW(model.named_parameters(), 0.25), torch.randn(6, 4).split(2), loss_fn,
                     (1.0, 1.0))
    assert model.calls == [True, True, False]


def test_dropout_differs_between_steps_ranks_and_seeds():
    draws = set()
    for seed, step, rank in ((42, 0, 0), (42, 1, 0), (42, 0, 1), (43, 0, 0)):
        train.seed_dropout(seed, step, rank)
        draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 4


def test_the_chain_loss_in_float64(micro):
    config = from_args(micro(dropout=0), "")[0]
    batch = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
    student, teacher = GPT(config).init_weights().train(), GPT(config).init_weights().eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(300)
        student.lm_head.weight.mul_(200)
        loss = distill.distilled_loss(student, [(teacher, 1.0)], batch, 0.45, 1.2).item()
        s, t = (torch.softmax(m(batch[:, :-1]).double() / 1.2, -1) for m in (student, teacher))
        kl = (t * (t / s).log()).sum(-1).mean()
        assert loss == pytest.approx((0.55 * train.label_loss(student, batch) + 0.45 * 1.44 * kl).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ runs

@pytest.fixture
def ready(micro):
    prepare.main(micro())
    return micro


def run_all(argv):
    train.main(argv)
    distill.main(argv)


def model_of(state):
    """name -> weight of a resume state."""
    return {name.removeprefix("model."): w for name, w in state[0].items() if name.startswith("model.")}


def members(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("trajectory_*/cycle_*"))}


def test_the_loop_follows_the_recipe(ready, monkeypatch):
    """Noise, rates, batches, cycle lengths, seeds and compilation of every cycle, against the recipe written out."""
    noise, steps, seeds, compiled = [], [], [], []
    perturb, step, seed_dropout, to_device = train.perturb, train.train_step, train.seed_dropout, GPT.to_device
    monkeypatch.setattr(train, "perturb", lambda model, scale, seed: (
        noise.append((len(steps), scale, seed)), perturb(model, scale, seed)))
    monkeypatch.setattr(train, "seed_dropout", lambda *args: (seeds.append(args), seed_dropout(*args)))
    monkeypatch.setattr(GPT, "to_device", lambda self, device, compile=False: (
        compiled.append(compile), to_device(self, device, compile))[1])
    def record(model, optimizer, micro_batches, loss_fn, multipliers):
        lr = optimizer.groups[0]["lr"]
        steps.append((sum(map(len, micro_batches)), multipliers, lr))
        return step(model, optimizer, micro_batches, loss_fn, multipliers)
    monkeypatch.setattr(train, "train_step", record)
    argv = ready(trajectories=1, seed=7, cycles=5, distill_from=3, batch_tokens=128, batch_tokens_ends=64,
                 epochs_per_cycle=0.4, lr_scale=0.3, compile=True)
    run_all(argv)
    epoch = loader.load(from_args(argv, "")[0]).sequences_per_epoch
    wanted, boundaries = [], []
    for c in range(5):
        sequences = 4 if 1 - abs(2 * c / 4 - 1) >= 0.5 else 2
        length = round(0.4 * epoch / sequences)
        assert length > 3
        if c:
            boundaries.append((len(wanted), [None, 0.25, 0.20, 0.10, 0.05][c], 7 * 100_003 + c * 31_337))
        for s in range(length):
            m_lr = 0.08 + 0.92 * (1 - s / length)
            wanted.append((sequences, (m_lr, 0.7 + 0.3 * (1 - m_lr) / 0.92), 0.002 * 0.3))
    assert [n for n, _, _ in noise] == [n for n, _, _ in boundaries] and [x[2] for x in noise] == [x[2] for x in boundaries]
    assert [x[1] for x in noise] == pytest.approx([x[1] for x in boundaries])
    assert [(n, lr) for n, _, lr in steps] == [(n, lr) for n, _, lr in wanted]
    assert [m for _, ms, _ in steps for m in ms] == pytest.approx([m for _, ms, _ in wanted for m in ms])
    assert seeds == [(7, i, 0) for i in range(len(wanted))]
    assert compiled == [True, True, True]                         # the model in train.py and in distill.py, and the teacher


def test_the_baseline_follows_one_cosine(ready, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train_step", lambda model, optimizer, rows, loss_fn, multipliers: (
        seen.append(multipliers), (torch.zeros(()), torch.zeros(())))[1])
    train.main(ready(trajectories=1, cycles=1, distill_from=1, schedule="cosine", epochs_per_cycle=0.5))
    assert len(seen) > 3 and seen == [(pytest.approx(0.5 * (1 + math.cos(math.pi * s / len(seen)))), 1.0)
                                      for s in range(len(seen))]


def test_snapshots_along_one_decay(ready, tmp_path, monkeypatch):
    """restart=none: the rates fall once over all cycles, nothing is disturbed between them, and pieces equal the whole."""
    seen, step = [], train.train_step
    def record(model, optimizer, micro_batches, loss_fn, multipliers):
        seen.append(multipliers)
        return step(model, optimizer, micro_batches, loss_fn, multipliers)
    monkeypatch.setattr(train, "train_step", record)
    monkeypatch.setattr(train, "perturb", None)
    argv = ready(trajectories=1, cycles=3, distill_from=3, first_cycle_epochs=1.25, epochs_per_cycle=0.5, restart="none")
    train.main(argv)
    config = from_args(argv, "")[0]
    data = loader.load(config)
    lengths = [round(e * data.sequences_per_epoch / 4) for e in (1.25, 0.5, 0.5)]
    assert len(set(lengths)) == 2 and len(seen) == sum(lengths)
    lr = [0.08 + 0.92 * (1 - s / len(seen)) for s in range(len(seen))]
    assert ([m for m, _ in seen] == pytest.approx(lr)
            and [d for _, d in seen] == pytest.approx([0.7 + 0.3 * (1 - m) / 0.92 for m in lr]))
    run = RunDirectory(config, data.fingerprint)
    assert [run.load_member(0, c)[1]["epochs"] for c in range(3)] == [1.25, 1.75, 2.25]
    prior.main(argv)
    assert [g["epochs"] for g in read_json(tmp_path / "run" / "prior.json")["growing"]] == [1.25, 1.75, 2.25]
    # the same training without a snapshot on the way ends at the same weights
    train.main(ready(trajectories=1, cycles=1, distill_from=1,
                     epochs_per_cycle=sum(lengths) * 4 / data.sequences_per_epoch, run_dir=tmp_path / "one"))
    once = read(tmp_path / "one" / "trajectory_00" / "cycle_000.safetensors")[0]
    assert all(torch.equal(w, once[n]) for n, w in run.load_member(0, 2)[0].items())


def test_a_member_can_be_an_average_of_the_weights(ready, tmp_path, monkeypatch, capsys):
    kept, step = [], train.train_step
    def record(model, *args):
        result = step(model, *args)
        kept.append({n: w.double().clone() for n, w in model.state_dict().items()})
        return result
    monkeypatch.setattr(train, "train_step", record)
    L = 40                                      # steps: two updates fit into the last tenth
    epochs = L * 4 / loader.load(from_args(ready(), "")[0]).sequences_per_epoch
    argv = ready(trajectories=1, cycles=2, distill_from=2, epochs_per_cycle=epochs, ema_decay=0.75, ema_every=3)
    train.main(argv)
    config = from_args(argv, "")[0]
    kept = kept[L:]                             # the second cycle knows nothing of the first's average
    average = None
    for s in range(L):                          # the last tenth, every third step, the last one included
        if s >= 0.9 * L and (L - 1 - s) % 3 == 0:
            average = kept[s] if average is None else {n: 0.75 * average[n] + 0.25 * w for n, w in kept[s].items()}
    run = RunDirectory(config, loader.load(config).fingerprint)
    member, about = run.load_member(0, 1)
    assert len(kept) == L and not torch.equal(average["lm_head.weight"], kept[-1]["lm_head.weight"])
    for name, w in model_of(run.load_checkpoint(0)).items():
        assert torch.allclose(w.double(), average[name], atol=1e-6) and torch.equal(member[name], w.bfloat16())
    model = GPT(config)
    model.load_state_dict(member)
    assert -loader.score(model, loader.load(config).fit, 4).mean() == pytest.approx(about["fit_loss"], abs=1e-3)
    with pytest.raises(SystemExit) as stop:
        train.main(ready(trajectories=1, cycles=1, distill_from=1, epochs_per_cycle=epochs, ema_decay=0.75, ema_every=4,
                         run_dir=tmp_path / "other"))
    assert stop.value.code == 2 and "ema_every=4" in error_line(capsys.readouterr().err) and not (tmp_path / "other").exists()


def test_looping_from_a_part_of_the_decay_on(ready, monkeypatch):
    applied, step = [], train.train_step
    def record(model, *args):
        calls = []
        hooks = [layer.register_forward_hook(lambda *a, i=i: calls.append(i)) for i, layer in enumerate(model.transformer.h)]
        result = step(model, *args)
        applied.append(calls[:len(calls) // 2])             # of the first of two micro-batches
        [hook.remove() for hook in hooks]
        return result
    monkeypatch.setattr(train, "train_step", record)
    scored, score = [], loader.score
    monkeypatch.setattr(loader, "score", lambda model, *args: scored.append(model.looping) or score(model, *args))
    train.main(ready(trajectories=1, cycles=2, distill_from=2, restart="none", epochs_per_cycle=0.5, n_layer=4,
                     loop_start=2, loop_end=4, loop_extra=1, loop_from=0.75))
    first, applied = applied[:len(applied) // 2], applied[len(applied) // 2:]
    assert first == [[0, 1, 2, 3]] * len(first)                 # three quarters of the one decay: half of its second cycle
    half = math.ceil(len(applied) / 2)
    assert len(applied) > 3 and applied == [[0, 1, 2, 3]] * half + [[0, 1, 2, 3, 2, 3]] * (len(applied) - half)
    assert scored == [True, True]                               # as whoever uses the members runs them


def test_memory_that_runs_out_is_one_line(ready, tmp_path, monkeypatch, capsys):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for script, patched in ((train, (train, "train_step")), (distill, (train, "train_step")), (prior, (loader, "score"))):
        monkeypatch.setattr(*patched, out_of_memory)
        with pytest.raises(SystemExit) as stop:
            script.main(ready())
        assert stop.value.code == 2 and "lower --micro_batch" in error_line(capsys.readouterr().err)
        monkeypatch.undo()
        script.main(ready())


def test_the_teacher_is_the_predecessor_and_the_first_cycles_have_none(ready, tmp_path, monkeypatch):
    teachers = []
    original = distill.distilled_loss
    def spy(student, frozen, batch, alpha, temperature):
        [(teacher, weight)] = frozen
        teachers.append((teacher.lm_head.weight.clone(), alpha, temperature, teacher.training,
                         teacher.lm_head.weight.requires_grad or weight != 1))
        return original(student, frozen, batch, alpha, temperature)
    monkeypatch.setattr(distill, "distilled_loss", spy)
    argv = ready(trajectories=1, distill_alpha=0.3, distill_temperature=1.7)
    train.main(argv)
    assert not teachers and len(members(tmp_path / "run")) == 2
    distill.main(argv)
    config = from_args(argv, "")[0]
    run, data = RunDirectory(config, loader.load(config).fingerprint), loader.load(config)
    steps, rest = divmod(len(teachers), cycle_lengths(config, data.sequences_per_epoch)[2] * 2)        # two micro-batches
    assert (steps, rest) == (2, 0)
    for i, (weight, alpha, temperature, training, grad) in enumerate(teachers):
        predecessor = run.load_member(0, 1 + i // (len(teachers) // 2))[0]["lm_head.weight"].float()
        assert torch.equal(weight, predecessor) and (alpha, temperature, training, grad) == (0.3, 1.7, False, False)


def test_members_say_what_they_are(ready, tmp_path):
    argv = ready()
    run_all(argv)
    config = from_args(argv, "")[0]
    data = loader.load(config)
    run = RunDirectory(config, data.fingerprint)
    assert run.members() == [(t, c) for t in range(2) for c in range(4)]
    weights, about = run.load_member(1, 3)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert (about["epochs"], about["identity"]["seed"]) == (2.0, 43)
    assert about["identity"]["n_embd"] == 32 and "run_dir" not in about["identity"]
    model = GPT(config)
    model.load_state_dict(weights)
    assert -loader.score(model, data.fit, 2).mean() == pytest.approx(about["fit_loss"], abs=1e-3)
    state = model_of(run.load_checkpoint(1))            # goes on from float32
    assert all(torch.equal(w.bfloat16(), weights[n]) for n, w in state.items())
    assert not torch.equal(state["lm_head.weight"], weights["lm_head.weight"].float())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"step", "cycle"} and len([x for x in lines if x["kind"] == "cycle"]) == 8


def test_a_run_in_pieces_equals_a_run_at_once(ready, tmp_path, monkeypatch):
    run_all(ready(run_dir=tmp_path / "whole"))
    class Stop(Exception):
        pass
    count, dice = 0, random.Random(0)
    def dying(save):                                # before or after some of the files that are kept
        def wrapper(*args, **about):
            nonlocal count
            count += 1
            if dice.random() < 0.3:
                raise Stop
            result = save(*args, **about)
            if dice.random() < 0.3:
                raise Stop
            return result
        return wrapper
    for name in ("save_member", "save_checkpoint"):
        monkeypatch.setattr(RunDirectory, name, dying(getattr(RunDirectory, name)))
    argv = ready(run_dir=tmp_path / "pieces")
    for script in (train, distill):
        for _ in range(100):
            try:
                script.main(argv)
                break
            except Stop:
                pass
    assert count > 25            # 16 without a death
    whole, pieces = members(tmp_path / "whole"), members(tmp_path / "pieces")
    assert len(whole) == 8 and whole == pieces
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "pieces").rglob("*.safetensors")}
    run_all(argv)                                   # nothing is done twice
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "pieces").rglob("*.safetensors")}


def test_an_average_half_made_goes_on_bit_for_bit(ready, tmp_path, monkeypatch):
    epochs = 30 * 4 / loader.load(from_args(ready(), "")[0]).sequences_per_epoch
    settings = dict(trajectories=1, cycles=2, distill_from=2, epochs_per_cycle=epochs, restart="fresh", schedule="warmdown",
                    momentum_warmup=50, ema_decay=0.75, ema_every=1, ema_share=0.4)     # cycles of 30 steps
    train.main(ready(run_dir=tmp_path / "whole", **settings))
    argv, died, save = ready(run_dir=tmp_path / "pieces", resume_every=29, **settings), set(), RunDirectory.save_checkpoint
    class Stop(Exception):
        pass
    def dying(run, t, tensors, step, environment):
        save(run, t, tensors, step, environment)
        if any(name.startswith("average.") for name in tensors) and step not in died:
            died.add(step)
            raise Stop
    monkeypatch.setattr(RunDirectory, "save_checkpoint", dying)
    for _ in range(3):
        with contextlib.suppress(Stop):
            train.main(argv)
            break
    assert died == {29, 58} and members(tmp_path / "pieces") == members(tmp_path / "whole")


def test_two_seeds_differ_and_trajectories_can_be_added(ready, tmp_path):
    run_all(ready(trajectories=1))
    run_all(ready(trajectories=1, seed=43, run_dir=tmp_path / "other"))
    one, other = members(tmp_path / "run"), members(tmp_path / "other")
    assert len(set(one.values()) | set(other.values())) == 8
    run_all(ready())
    two = members(tmp_path / "run")
    assert len(two) == 8 and one.items() <= two.items()
    # trajectory 1 of seed 42 is trajectory 0 of seed 43: same weights
    weights = [read(p)[0] for p in (
        tmp_path / "run" / "trajectory_01" / "cycle_003.safetensors", tmp_path / "other" / "trajectory_00" / "cycle_003.safetensors")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_single_config_has_no_chain(ready, capsys):
    argv = ready(trajectories=1, cycles=1, distill_from=1, schedule="cosine", epochs_per_cycle=1)
    train.main(argv)
    assert "prior.py" in capsys.readouterr().out.splitlines()[-1]
    distill.main(argv)
    assert "no chain" in capsys.readouterr().out


def test_who_shares_what(micro, monkeypatch, capsys):
    config = lambda **kw: from_args(micro(**kw), "")[0]
    assert all(can_share(config(trajectories=1), n) for n in (1, 2, 4)) and not can_share(config(trajectories=1), 8)    # 4 sequences
    assert can_share(config(trajectories=4), 4) and can_share(config(trajectories=1, batch_tokens_ends=192), 2)
    assert not can_share(config(trajectories=1, batch_tokens_ends=192), 3)
    assert processes(config()) == min(2, os.cpu_count()) and processes(config(trajectories=1)) == 1
    assert [processes(config(trajectories=1), n) for n in (3, 8)] == [2, 4]
    record = RECIPES["1p8b_960"]
    assert can_share(record, 8) and can_share(record, 40) and not can_share(record, 5 * 128)
    for name, value in (("WORLD_SIZE", "8"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        join(config(trajectories=1))
    assert "8 ranks for a trajectory: start 4 processes" in error_line(capsys.readouterr().err)


def test_micro_batches_are_the_fewest_equal_parts(micro):
    """micro_batch is the most sequences of a backward pass; every share of a batch is cut evenly."""
    for micro_batch in range(1, 9):
        config = from_args(micro(micro_batch=micro_batch), "")[0]
        for share, ranks in ((n, r) for n in range(1, 25) for r in (1, 3)):
            size = micro_batch_size(config, share * ranks, ranks)
            parts = next(p for p in range(1, share + 1) if share % p == 0 and share // p <= micro_batch)
            assert size == share // parts


def launch_train(argv, processes, log):
    """train.py in so many ranks."""
    assert kill.finish(kill.start(argv, log, processes, scripts=(train,))) == [0] * processes, log.read_text()[-2000:]


def test_two_processes_take_the_step_of_one(ready, tmp_path):
    """
    One step of one trajectory on 1 and on 2 ranks, dropout 0: the same tokens, so the same loss and gradient, and the same
    step.
    """
    steps, states = [], []
    for name, processes in (("one", 1), ("two", 2)):
        launch_train(ready(trajectories=1, dropout=0, epochs_per_cycle=0.05, cycles=1, distill_from=1,
                           run_dir=tmp_path / name), processes, tmp_path / "log")
        steps.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]))
        states.append(read(tmp_path / name / "trajectory_00" / "resume.safetensors"))
    assert [about["step"] for _, about in states] == [1, 1]
    assert (steps[1]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-5)
            and steps[1]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-5))
    for name, a in model_of(states[0]).items():
        # q and k heads are normalised, so the diagonal of their mix has no gradient but rounding, which AdamW takes for one
        if not name.endswith(("q_mix", "k_mix")):
            assert (a - model_of(states[1])[name]).norm() <= 2e-3 * a.norm(), name
        first, second = (tensors[f"m.{name}"] for tensors, _ in states)       # the first moment: the gradient
        assert (first - second).norm() <= 1e-4 * first.norm() + 1e-9, name


def test_two_processes_train_two_trajectories_as_one_does(ready, tmp_path):
    """Each of 2 ranks has a trajectory of its own: members equal, bit for bit, to those of one process."""
    common = dict(epochs_per_cycle=0.1, cycles=2, distill_from=2)
    for name, count in (("one", 1), ("two", 2)):
        launch_train(ready(**common, run_dir=tmp_path / name), count, tmp_path / "log")
    one = members(tmp_path / "one")
    assert len(one) == 4 and one == members(tmp_path / "two")


def test_ranks_of_a_group_take_disjoint_parts_of_every_batch(ready, monkeypatch):
    """Whatever the ranks, the rows of a step are those of one rank."""
    seen, argv = {}, ready(trajectories=1, epochs_per_cycle=0.1, cycles=1, distill_from=1, micro_batch=1)
    def record(rank, size):
        def step(model, optimizer, micro_batches, *rest):
            seen.setdefault((size, rank), []).append(torch.cat(micro_batches))
            return torch.zeros(()), torch.zeros(())
        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train, "join", lambda config: Ranks(rank, 1, torch.device("cpu"), 1, [0], rank, size))
        monkeypatch.setattr(Ranks, "mean", lambda self, *values: [0.0, 0.0, 0.0])
        train.main(argv)
    # each of these runs starts anew, and there are no other ranks to ask
    for name in ("save_member", "save_checkpoint"):
        monkeypatch.setattr(RunDirectory, name, lambda *a, **k: None)
    monkeypatch.setattr(train, "distributed", lambda model, world: model)
    monkeypatch.setattr("time.time_ns", lambda: 0)                              # by which ranks know one launch
    drawn, seed_dropout = {}, train.seed_dropout
    monkeypatch.setattr(train, "seed_dropout", lambda seed, step, rank: (
        drawn.setdefault((seed, step), set()).add(rank), seed_dropout(seed, step, rank)))
    for rank, size in ((0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)):
            record(rank, size)
    for size in (2, 4):
        for step, whole in enumerate(seen[1, 0]):
            parts = torch.cat([seen[size, rank][step] for rank in range(size)])
            assert sorted(parts.tolist()) == sorted(whole.tolist())
    assert all(ranks == {0, 1, 2, 3} for ranks in drawn.values())               # every rank its own dropout


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, lambda temporary: temporary.write_bytes(b"first"))
    def half(temporary):
        temporary.write_bytes(b"sec")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(path, half)
    assert path.read_bytes() == b"first" and error.value.filename == str(path) and os.listdir(path.parent) == ["file"]


def test_a_world_of_one_needs_no_launcher(micro):
    ranks = join(from_args(micro(), "")[0])
    assert (ranks.world_size, ranks.trajectories, ranks.group_size, ranks.is_main) == (1, [0, 1], 1, True)
    ranks.barrier(everyone=True)
    ranks.leave()


def test_the_next_command_starts_the_same_ranks(monkeypatch):
    for ranks, local, nodes, words in ((1, 1, 1, "python"), (8, 8, 1, "--local-addr=127.0.0.1 --standalone --nproc_per_node=8"),
                                       (40, 8, 5, "--nnodes=5 --nproc_per_node=8")):
        for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", local), ("GROUP_WORLD_SIZE", nodes)):
            monkeypatch.setenv(name, str(value))
        command = next_command("prior.py", ["configs/tiny.py", "--seed=1"])
        assert words in command and command.split("    #")[0].endswith("prior.py configs/tiny.py --seed=1"), command
        assert ("nproc_per_node=8" in command) == (ranks > 1) and ("rdzv" in command) == (nodes > 1)


def test_a_gpu_without_flash_attention_is_refused(micro, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(SystemExit) as stop:
        join(from_args(micro(), "")[0])
    assert stop.value.code == 2 and "compute capability 8.0" in error_line(capsys.readouterr().err)


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(micro, monkeypatch, capsys):
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/nvidia0")
    join(from_args(micro(), "")[0])                          # asked for: CUDA_VISIBLE_DEVICES is empty in the tests
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(SystemExit) as stop:
        join(from_args(micro(), "")[0])
    assert stop.value.code == 2 and "driver" in (err := error_line(capsys.readouterr().err)) and "CUDA_VISIBLE_DEVICES=" in err


def test_a_loss_that_is_no_number_stops_before_anything_is_kept(ready, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "label_loss", lambda model, batch: model(batch[:, :-1], batch[:, 1:])[1] * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train.main(ready())
    assert stop.value.code == 1 and "nan" in error_line(capsys.readouterr().err) and not members(tmp_path / "run")
