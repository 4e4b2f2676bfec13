"""The schedule against tables written by hand, noise, one step in parts, resume, and 1 process against 2."""
import contextlib
import json
import math
import os

import numpy as np
import pytest
import torch

import distill
import prior
import train
from data import loader
from infra.config import from_args
from infra.console import next_command
from infra.distributed import can_share, join, micro_batch_size, processes
from infra.files import read_json
from model import GPT, Block
from optim import MuonAdamW
from tests import soak
from tests.conftest import config_of, moving, population_of, read, tree


@pytest.mark.parametrize("schedule, length, table", [
    ("cosine", 4, {0: (1, 1), 2: (0.5, 1), 4: (0, 1)}),
    ("warmdown", 10, {0: (1, 1), 8: (1, 1), 9: (0.5, 1)}),
])
def test_rates_within_a_decay(schedule, length, table):
    for step, rates in table.items():
        assert train.rate_multipliers(schedule, step, length) == pytest.approx(rates, abs=1e-12)


def test_the_momentum_rises_to_its_value():
    p, wanted = torch.nn.Parameter(torch.randn(4, 4)), 0
    optimizer = MuonAdamW([("p", p)], 0.25, momentum_warmup=2)
    for momentum in (0.85, 0.90, 0.95, 0.95):
        p.grad, wanted = torch.ones(4, 4), momentum * wanted + 1 - momentum
        optimizer.step(1, 1)
        assert optimizer.moments()["m.p"].mean().item() == pytest.approx(wanted)


def test_one_cycle_takes_the_middle_batch_and_two_have_the_first_noise():
    config = config_of("single", "--batch_tokens_ends=512")
    assert train.tokens_per_step(config, 0) == 1024 and train.noise_scale(1, 2) == 0.25


@pytest.mark.parametrize("head", [1, 3000])
def test_micro_batches_add_up_to_the_batch(head, micro):
    """The loss, and the gradients, which are clipped to norm 1."""
    config = from_args(micro(dropout=0), "")[0]
    batch = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for size in (4, 2, 1):
        torch.manual_seed(0)
        model = GPT(config).init_weights().train()
        with torch.no_grad():
            model.lm_head.weight.mul_(head)
        optimizer = MuonAdamW(model.named_parameters(), config.lr_scale)
        loss, norm = train.train_step(model, optimizer, batch.split(size), train.label_loss, (0.0, 0.0))
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert norm < 1 if head == 1 else norm > 5
        assert gradients[-1].norm().item() == pytest.approx(min(norm.item(), 1), rel=1e-3)
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    assert all(torch.allclose(g, gradients[0], atol=1e-5) for g in gradients)


def test_ranks_exchange_gradients_with_the_last_micro_batch_only():
    model, log = torch.nn.Linear(4, 4, bias=False), []

    @contextlib.contextmanager
    def no_sync():
        log.append("waits")
        yield
        log.append("goes on")
    model.no_sync = no_sync
    model.weight.register_hook(lambda gradient: log.append("backward"))
    optimizer = MuonAdamW(model.named_parameters(), 0.25)
    train.train_step(model, optimizer, torch.randn(6, 4).split(2), lambda m, x: m(x).square().mean(), (1, 1))
    assert log == 2 * ["waits", "backward", "goes on"] + ["backward"]


def test_dropout_differs_between_steps_ranks_and_seeds():
    draws = set()
    for arguments in ((42, 0, 0), (42, 1, 0), (42, 0, 1), (43, 0, 0)):
        train.seed_dropout(*arguments)
        draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 4


# ------------------------------------------------------------------------------------------------ runs

def run_all(argv):
    train.main(argv)
    distill.main(argv)


def members(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("trajectory_*/cycle_*"))}


def test_the_loop_follows_the_recipe(ready, watch):
    """Noise, rates, batches, cycle lengths, seeds, compilation: against the recipe written out."""
    steps = watch(train, "train_step", lambda model, optimizer, rows, loss_fn, rates: (
        sum(map(len, rows)), optimizer.groups[0]["lr"], *rates, model.training))
    noise = watch(train, "perturb", lambda model, scale, seed: (len(steps), scale, seed))
    seeds = watch(train, "seed_dropout", lambda *args: args)
    compiled = watch(GPT, "to_device", lambda model, device, compile=False: compile)
    argv = ready(trajectories=1, seed=7, cycles=5, distill_from=3, batch_tokens_ends=64, epochs_per_cycle=0.4,
                 lr_scale=0.3, compile=True)
    run_all(argv)
    epoch, wanted, boundaries = population_of(argv)[1].sequences_per_epoch, [], []
    for c in range(5):
        sequences = 4 if 1 - abs(2 * c / 4 - 1) >= 0.5 else 2
        length = round(0.4 * epoch / sequences)
        assert length > 3
        if c:
            boundaries.append((len(wanted), [None, 0.25, 0.20, 0.10, 0.05][c], 7 * 100_003 + c * 31_337))
        for s in range(length):
            lr = 0.08 + 0.92 * (1 - s / length)
            wanted.append((sequences, 0.002 * 0.3, lr, 0.7 + 0.3 * (1 - lr) / 0.92, True))
    assert np.array(noise) == pytest.approx(np.array(boundaries))
    assert np.array(steps) == pytest.approx(np.array(wanted))
    assert seeds == [(7, i, 0) for i in range(len(wanted))]
    assert compiled == [True, True, True]           # the model in train.py and in distill.py, and the teacher


def test_snapshots_along_one_decay(ready, tmp_path, monkeypatch, watch, capsys):
    """restart=none: rates fall once over all cycles, which nothing disturbs: pieces equal the whole."""
    rates = watch(train, "train_step", lambda *args: args[-1])
    monkeypatch.setattr(train, "perturb", None)
    argv = ready(trajectories=1, cycles=3, distill_from=3, first_cycle_epochs=1.25, restart="none")
    train.main(argv)
    assert "prior.py" in capsys.readouterr().out.splitlines()[-1]
    distill.main(argv)
    assert "no chain" in capsys.readouterr().out
    config, data, run = population_of(argv)
    lengths = [round(e * data.sequences_per_epoch / 4) for e in (1.25, 0.5, 0.5)]
    assert len(set(lengths)) == 2 and len(rates) == sum(lengths)
    lr = np.array([0.08 + 0.92 * (1 - s / len(rates)) for s in range(len(rates))])
    assert np.array(rates) == pytest.approx(np.stack([lr, 0.7 + 0.3 * (1 - lr) / 0.92], 1))
    prior.main(argv)
    assert [g["epochs"] for g in read_json(tmp_path / "run" / "prior.json")["growing"]] == [1.25, 1.75, 2.25]
    # the same training without a snapshot on the way ends at the same weights
    train.main(ready(trajectories=1, cycles=1, distill_from=1, run_dir=tmp_path / "one",
                     epochs_per_cycle=sum(lengths) * 4 / data.sequences_per_epoch))
    once = read(tmp_path / "one" / "trajectory_00" / "cycle_000.safetensors")[0]
    assert all(torch.equal(w, once[n]) for n, w in run.load_member(0, 2)[0].items())


def test_looping_from_a_part_of_the_decay_on(ready, watch):
    blocks = watch(Block, "forward", lambda block, *rest: block)
    starts = watch(train, "train_step", lambda *args: len(blocks))
    scored = watch(loader, "score", lambda model, *args: model.looping)
    train.main(ready(trajectories=1, cycles=2, distill_from=2, restart="none", n_layer=4, mtp_weight=0,
                     loop_start=2, loop_end=4, loop_extra=1, loop_from=0.75))
    layers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    plain = math.ceil(0.75 * len(starts))
    assert [[layers[block] for block in blocks[n:n + 6]] for n in starts] == (
        plain * [[0, 1, 2, 3, 0, 1]] + (len(starts) - plain) * [[0, 1, 2, 3, 2, 3]]) and plain > 3
    assert scored == [True, True]                               # as whoever uses the members runs them


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def another_model(model, config, init=GPT.__init__):
    init(model, config)
    model.added = torch.nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize("change, words", [
    ((train, "train_step", out_of_memory), ["lower --micro_batch"]),
    ((GPT, "__init__", another_model), ["of another model", "trajectory_00'", "restore it, or delete"]),
    ((distill, "teacher_of", lambda run, t, cycle: 0), ["cycle_000.safetensors' is not", "No such file"]),
])
def test_a_chain_that_cannot_go_on(change, words, ready, tmp_path, monkeypatch, refused):
    """Too little memory, model.py edited since the checkpoint, a teacher deleted: nothing is lost."""
    argv = ready(trajectories=1)
    train.main(argv)
    (tmp_path / "run" / "trajectory_00" / "cycle_000.safetensors").unlink()
    before = tree(tmp_path)
    with monkeypatch.context() as fault:
        fault.setattr(*change)
        line = refused(distill.main, argv)
    assert all(word in line for word in words) and tree(tmp_path) == before, line
    distill.main(argv)


# ------------------------------------------------------------------------------------------------ ranks

def test_who_shares_what(micro):
    def config(**changes):
        return from_args(micro(**changes), "")[0]
    one, odd = config(trajectories=1), config(trajectories=1, batch_tokens_ends=192)
    record = config_of("1p8b_960")
    assert [n for n in (1, 2, 4, 8) if can_share(one, n)] == [1, 2, 4]              # of 4 sequences
    assert can_share(config(trajectories=4), 4) and can_share(odd, 2) and not can_share(odd, 3)
    assert processes(config()) == min(2, os.cpu_count()) and processes(one) == 1
    assert [processes(one, n) for n in (3, 8)] == [2, 4]
    assert can_share(record, 8) and can_share(record, 40) and not can_share(record, 5 * 128)


def test_micro_batches_are_the_fewest_equal_parts(micro):
    """micro_batch is the most sequences of a backward pass; every share of a batch is cut evenly."""
    for micro_batch in range(1, 9):
        config = from_args(micro(micro_batch=micro_batch), "")[0]
        for share, ranks in ((n, r) for n in range(1, 25) for r in (1, 3)):
            parts = next(p for p in range(1, share + 1) if share % p == 0 and share // p <= micro_batch)
            assert micro_batch_size(config, share * ranks, ranks) == share // parts


@pytest.fixture
def launch(ready, tmp_path):
    """launch(ranks, name=value, ...) -> the folder of a run of train.py in so many ranks."""
    def of(ranks, patch=lambda rank: None, **settings):
        run = soak.Run(ready(**settings), tmp_path / f"run_{ranks}")
        assert run.codes(size=ranks, patch=patch, scripts=(train,)) == [0] * ranks, run.said()
        return run.folder
    return of


def test_two_processes_take_the_step_of_one(launch, tmp_path):
    """
    One step on 1 and 2 ranks, without dropout (they draw their own): the same loss, gradient, weights; and
    of matrices' moments each has its share alone.
    """
    def note(rank):
        soak.before(train, "seed_dropout", lambda *args: (tmp_path / f"dropout_{rank}").write_text(str(args)))
        soak.before(MuonAdamW, "step", lambda optimizer, *_: (tmp_path / f"share_{rank}").write_text(
            str(sum(len(g["m"]) for g in optimizer.groups if g["kind"] == "muon"))))
    steps, states, shares = [], [], []
    for ranks in (1, 2):
        folder = launch(ranks, note, trajectories=1, dropout=0, epochs_per_cycle=0.05, cycles=1)
        shares.append([int((tmp_path / f"share_{rank}").read_text()) for rank in range(ranks)])
        steps.append(json.loads(next(open(folder / "metrics.jsonl"))))
        states.append(read(folder / "trajectory_00" / "resume.safetensors"))
    assert [about["step"] for _, about in states] == [1, 1]
    assert sum(shares[1]) == shares[0][0] and max(shares[1]) < 0.7 * shares[0][0]
    assert [(tmp_path / f"dropout_{rank}").read_text() for rank in (0, 1)] == ["(42, 0, 0)", "(42, 0, 1)"]
    for key in ("loss", "grad_norm"):
        assert steps[1][key] == pytest.approx(steps[0][key], rel=1e-5)
    one, two = (tensors for tensors, _ in states)
    for name, a in moving(one).items():
        # q, k heads are normalised: the diagonal of their mix has no gradient but rounding, for AdamW one
        if not name.endswith(("q_mix", "k_mix")):
            assert (a - moving(two)[name]).norm() <= 2e-3 * a.norm(), name
        first, second = one[f"m.{name}"], two[f"m.{name}"]                  # the first moment: the gradient
        assert (first - second).norm() <= 1e-4 * first.norm() + 1e-9, name


def test_two_processes_train_two_trajectories_as_one_does(launch):
    """Each of 2 ranks has a trajectory of its own: members equal, bit for bit, to those of one process."""
    one, two = (members(launch(n, epochs_per_cycle=0.1, cycles=2)) for n in (1, 2))
    assert len(one) == 4 and one == two


def test_the_next_command_starts_the_same_ranks(monkeypatch):
    alone = "--local-addr=127.0.0.1 --standalone --nproc_per_node=8"
    for ranks, local, nodes, words in (
            (1, 1, 1, "python"), (8, 8, 1, alone), (40, 8, 5, "--nnodes=5 --nproc_per_node=8")):
        for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", local), ("GROUP_WORLD_SIZE", nodes)):
            monkeypatch.setenv(name, str(value))
        command = next_command("prior.py", ["configs/tiny.py", "--seed=1"])
        assert words in command, command
        assert command.split("    #")[0].endswith("prior.py configs/tiny.py --seed=1"), command
        assert ("nproc_per_node=8" in command) == (ranks > 1) and ("rdzv" in command) == (nodes > 1)


def test_a_gpu_that_cannot_be_used_is_refused(micro, monkeypatch, refused):
    """It is no reason to train on the CPU, unless one asks for it."""
    config = from_args(micro(), "")[0]
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/nvidia0")
    for none in ("-1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        join(config)                        # asked for
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    line = refused(join, config)
    assert "driver" in line and "CUDA_VISIBLE_DEVICES=" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))     # no flash attention
    assert "compute capability 8.0" in refused(join, config)
