"""The optimizer against torch's own AdamW and Muon's formulas in float64, and its share on two ranks."""
import pytest
import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from optim import POLAR_EXPRESS, MuonAdamW


def tiny_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(sequence_len=8, vocab_size=30, n_layer=2, n_head=2, n_embd=32)).init_weights()


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_torchs():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = MuonAdamW(ours.named_parameters(), 0.25)
    their_parameters = dict(theirs.named_parameters())
    assert sorted(n for g in optimizer.groups for n in g["names"]) == sorted(their_parameters)
    groups = [g for g in optimizer.groups if g["kind"] == "adamw"]
    reference = torch.optim.AdamW([
        dict(params=[their_parameters[n] for n in g["names"]], lr=g["lr"], initial_lr=g["lr"], eps=g["eps"],
             weight_decay=g["weight_decay"], decay=g["weight_decay"], betas=g["betas"]) for g in groups])
    for step, (lr, wd) in enumerate([(1, 0.7), (0.5, 0.8), (0.1, 1.0)]):
        set_gradients(ours.parameters(), step)
        set_gradients(theirs.parameters(), step)
        optimizer.step(lr, wd)
        for g in reference.param_groups:
            g["lr"], g["weight_decay"] = g["initial_lr"] * lr, g["decay"] * wd
        reference.step()
    for g in groups:
        for n, p in zip(g["names"], g["params"]):
            assert torch.allclose(p, their_parameters[n], rtol=1e-5, atol=1e-7), n


@pytest.mark.parametrize("rows, cols, warmup", [(40, 24, 0), (24, 40, 2), (32, 32, 0)])
def test_muon_against_its_formulas_in_float64(rows, cols, warmup, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr("optim.STACK", 2 * rows * cols)         # a stack is two of three matrices
    matrices = [(f"m{i}", torch.nn.Parameter(torch.randn(rows, cols))) for i in range(3)]
    W = [p.detach().double().clone() for _, p in matrices]
    M, V = ([torch.zeros(n, dtype=torch.float64) for _ in W] for n in ((rows, cols), max(rows, cols)))
    optimizer = MuonAdamW(matrices, 0.5, momentum_warmup=warmup)
    rates = [(1, 0.7), (0.5, 0.9), (0.2, 1.0), (0.1, 1.0)]
    for step, (lr_mult, wd_mult) in enumerate(rates):
        set_gradients([p for _, p in matrices], step)
        lr, wd = 0.04 * 0.5 * max(1, rows / cols) ** 0.5 * lr_mult, 1.3 * wd_mult
        momentum = (0.85, 0.90, 0.95, 0.95)[step] if warmup else 0.95
        for i, (_, p) in enumerate(matrices):
            g = p.grad.double()
            M[i] = momentum * M[i] + (1 - momentum) * g
            u = (1 - momentum) * g + momentum * M[i]
            u = u / u.norm(dim=1, keepdim=True)
            X = u / (1.02 * u.norm() + 1e-6)
            for a, b, c in POLAR_EXPRESS:
                A = X @ X.T
                X = a * X + (b * A + c * A @ A) @ X
            V[i] = 0.95 * V[i] + 0.05 * X.square().mean(dim=1 if rows >= cols else 0)
            Y = X / (V[i][:, None] if rows >= cols else V[i][None, :]).sqrt()
            Y = Y * X.norm() / Y.norm()
            W[i] = W[i] - lr * Y - lr * wd * W[i] * (Y * W[i] >= 0)
        optimizer.step(lr_mult, wd_mult)
    for w, (_, p) in zip(W, matrices):
        assert (p.double() - w).norm() / w.norm() < 1e-3


def three_steps(group=None):
    """Weights, state, matrices whose moments are here, after three steps; ranks resume before the last."""
    model = tiny_model()
    optimizer = MuonAdamW(model.named_parameters(), 0.25, group)
    for step in range(3):
        if step == 2 and group:
            saved = [optimizer.state_dict()]
            dist.broadcast_object_list(saved, src=0)            # as the second rank finds it in the file
            optimizer = MuonAdamW(model.named_parameters(), 0.25, group)
            optimizer.load_state_dict(saved[0], step)
        set_gradients(model.parameters(), step)
        optimizer.step(1, 1)
    matrices = sum(len(g["m"]) for g in optimizer.groups if g["kind"] == "muon")
    return model.state_dict(), optimizer.state_dict(), matrices


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(three_steps(dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_matrices_and_step_as_one(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    weights, state, matrices = three_steps()
    (theirs, first, share), (others, second, other) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for n, w in weights.items():
        assert torch.allclose(w, theirs[n], rtol=1e-5, atol=1e-7) and torch.equal(theirs[n], others[n]), n
    assert first.keys() == state.keys() and not second          # only the first rank writes
    assert all(torch.allclose(t, first[n], rtol=1e-4, atol=1e-8) for n, t in state.items())
    assert share + other == matrices and max(share, other) < 0.7 * matrices
