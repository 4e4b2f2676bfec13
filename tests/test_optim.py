"""The optimizer against torch's own AdamW, a singular value decomposition, and Muon's formulas in float64."""
import pytest
import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from optim import POLAR_EXPRESS, MuonAdamW, polar_express


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
    their_parameters, groups = dict(theirs.named_parameters()), [g for g in optimizer.groups if g["kind"] == "adamw"]
    reference = torch.optim.AdamW([dict(params=[their_parameters[n] for n in g["names"]], lr=g["lr"], betas=g["betas"],
                                        eps=g["eps"], weight_decay=g["weight_decay"], initial_lr=g["lr"],
                                        decay=g["weight_decay"]) for g in groups])
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


@pytest.mark.parametrize("rows, cols", [(40, 24), (24, 40), (32, 32)])
def test_polar_express_is_the_polar_factor(rows, cols):
    G = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0))
    X = polar_express(G)
    U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
    singular = torch.linalg.svdvals(X)
    assert 0.8 < singular.min() and singular.max() < 1.2
    assert (X - U @ V).norm(dim=(1, 2)).div((U @ V).norm(dim=(1, 2))).max() < 0.12


@pytest.mark.parametrize("rows, cols", [(40, 24), (24, 40), (32, 32)])
def test_muon_against_its_formulas_in_float64(rows, cols):
    torch.manual_seed(1)
    matrices = [(f"m{i}", torch.nn.Parameter(torch.randn(rows, cols))) for i in range(2)]        # stepped as one stack
    W = [p.detach().double().clone() for _, p in matrices]
    M, V = ([torch.zeros(rows, cols, dtype=torch.float64) for _ in W],
            [torch.zeros(rows if rows >= cols else cols, dtype=torch.float64) for _ in W])
    optimizer = MuonAdamW(matrices, 0.5)
    for step, (lr_mult, wd_mult) in enumerate([(1, 0.7), (0.5, 0.9), (0.2, 1.0)]):
        set_gradients([p for _, p in matrices], step)
        lr, wd = 0.04 * 0.5 * max(1, rows / cols) ** 0.5 * lr_mult, 1.3 * wd_mult
        for i, (_, p) in enumerate(matrices):
            g = p.grad.double()
            M[i] = 0.95 * M[i] + 0.05 * g
            u = 0.05 * g + 0.95 * M[i]
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


def test_state_by_name_continues_bit_for_bit():
    a, b = tiny_model(), tiny_model()
    one, two = MuonAdamW(a.named_parameters(), 0.25), MuonAdamW(b.named_parameters(), 0.25)
    set_gradients(a.parameters(), 0)
    one.step(1, 1)
    b.load_state_dict(a.state_dict())
    two.load_state_dict(one.state_dict(), one.steps)
    for model, optimizer in ((a, one), (b, two)):
        set_gradients(model.parameters(), 1)
        optimizer.step(1, 1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert set(one.state_dict()) == {f"{kind}.{n}" for n, _ in a.named_parameters() for kind in "mv"}


def test_the_optimizer_owns_exactly_the_parameters():
    model = tiny_model()
    optimizer = MuonAdamW(model.named_parameters(), 0.25)
    assert sorted(n for g in optimizer.groups for n in g["names"]) == sorted(n for n, _ in model.named_parameters())
    with pytest.raises(AssertionError):
        other = MuonAdamW([("w", torch.nn.Parameter(torch.zeros(4, 4)))], 0.25)
        optimizer.load_state_dict(other.state_dict(), 1)


def three_steps(group):
    """
    Weights, state and the number of matrices whose moments are kept here, after three steps with a resume before the last.
    """
    model = tiny_model()
    optimizer = MuonAdamW(model.named_parameters(), 0.25, group)
    for step in range(3):
        if step == 2:
            saved = [optimizer.state_dict()]
            if group is not None:                               # as the second rank finds it in the file
                dist.broadcast_object_list(saved, src=0)
            optimizer = MuonAdamW(model.named_parameters(), 0.25, group)
            optimizer.load_state_dict(saved[0], step)
        set_gradients(model.parameters(), step)
        optimizer.step(1, 1)
    return model.state_dict(), optimizer.state_dict(), sum(len(g["m"]) for g in optimizer.groups if g["kind"] == "muon")


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(three_steps(dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_matrices_and_step_as_one(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    weights, state, matrices = three_steps(None)
    shares = []
    for rank in (0, 1):
        theirs, their_state, share = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        shares.append(share)
        assert all(torch.allclose(w, theirs[n], rtol=1e-5, atol=1e-7) for n, w in weights.items())
        if rank > 0:                                            # only the first rank writes
            assert not their_state
            continue
        assert their_state.keys() == state.keys()
        assert all(torch.allclose(t, their_state[n], rtol=1e-4, atol=1e-8) for n, t in state.items())
    assert sum(shares) == matrices and max(shares) < 0.7 * matrices
