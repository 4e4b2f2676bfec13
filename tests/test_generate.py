"""Sampling from mixtures: the probabilities are the weighted sum, K members cost K passes, bad input is refused."""
from types import SimpleNamespace

import pytest
import torch

import distill
import prior
import train
from data import prepare
from infra.files import read_json, write_json
from tools import generate


class Fixed(torch.nn.Module):
    """Always the same next-token probabilities."""
    def __init__(self, p):
        super().__init__()
        self.logits, self.config, self.device, self.passes = (
            torch.tensor(p).log(), SimpleNamespace(sequence_len=4), torch.device("cpu"), 0)
        self.context = []
    def forward(self, idx):
        assert idx.shape[0] == 1 and idx.shape[1] <= 4
        self.passes += 1
        self.context.append(idx.size(1))
        return self.logits.expand(1, idx.size(1), -1)


def options(**changes):
    return SimpleNamespace(**{**generate.OPTIONS, **changes})


def test_the_mixture_is_the_weighted_sum_of_probabilities():
    models = [Fixed([0.7, 0.2, 0.1, 1e-9]), Fixed([0.1, 0.1, 0.8, 1e-9])]
    ids = generate.sample(models, [0.25, 0.75], [3], options(tokens=4000, temperature=1.0, top_k=0), stop=3)
    counts = torch.bincount(torch.tensor(ids), minlength=3) / len(ids)
    assert counts[:3].tolist() == pytest.approx([0.25, 0.125, 0.625], abs=0.03)
    assert [m.passes for m in models] == [4000, 4000] and models[0].context[:6] == [1, 2, 3, 4, 4, 4]


def test_temperature_top_k_seed_and_stop():
    p = torch.tensor([0.5, 0.3, 0.2])
    assert generate.next_probabilities(p, 0.5, 0).tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    assert generate.next_probabilities(p, 1.0, 2).tolist() == pytest.approx([0.625, 0.375, 0])
    assert generate.next_probabilities(torch.full((4,), 0.25), 1.0, 1).tolist().count(0) == 3         # ties do not widen it
    assert generate.next_probabilities(p, 0.0, 0).tolist() == [1, 0, 0]
    draw = lambda seed: generate.sample([Fixed([0.4, 0.3, 0.3])], [1.0], [0], options(tokens=50, sample_seed=seed), stop=-1)
    assert draw(1) == draw(1) != draw(2)
    assert generate.sample([Fixed([1e-9, 1e-9, 1.0])], [1.0], [0], options(tokens=50), stop=2) == [2]


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    from tests.conftest import MICRO, ROOT
    folder = tmp_path_factory.mktemp("generate")
    values = {**MICRO, "data_dir": folder / "data", "run_dir": folder / "run", "trajectories": 1, "cycles": 3,
              "epochs_per_cycle": 0.1}
    argv = [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in values.items())]
    for script in (prepare, train, distill, prior):
        script.main(argv)
    return folder, argv


def test_two_lines_and_their_price(population, capsys):
    folder, argv = population
    capsys.readouterr()
    generate.main([*argv, "--K=2", "--tokens=5", "--prompt=If "])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(("best member (1 pass a token): 'If ", 'best member (1 pass a token): "If '))
    assert lines[1].startswith(("mixture of 2, 1 with weight (1 pass", "mixture of 2 (2 passes"))
    generate.main([*argv, "--member=0,1", "--tokens=5"])
    assert capsys.readouterr().out.startswith("member 0,1")


@pytest.mark.parametrize("args, names", [
    (["--K=3000"], ["K=3000", "1, 2, 3"]),
    (["--K=two"], ["K="]),
    (["--member=7,7"], ["member=7,7", "--member="]),
    (["--member=0,²"], ["member"]),
    (["--prompt=\udcff"], ["prompt"]),
    ([f"--sample_seed={2 ** 64}"], ["sample_seed"]),
    (["--temperature=-1"], ["temperature"]),
    (["--temperature=nan"], ["temperature"]),
    (["--tokens=0"], ["tokens"]),
    (["--top_k=-2"], ["top_k"]),
    (["--sample_seed=-1"], ["sample_seed"]),
    (["--promt=x"], ["promt"]),
])
def test_bad_requests_are_refused(args, names, population, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main([*population[1], *args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(name in err for name in names), err


def test_a_prior_of_other_members_is_refused(population, capsys):
    folder, argv = population
    path = folder / "run" / "prior.json"
    kept = path.read_text()
    other = read_json(path)
    other["members"][1]["weights_sha256"] = "0" * 64
    write_json(path, other)
    with pytest.raises(SystemExit) as stop:
        generate.main(argv)
    path.write_text(kept)
    assert stop.value.code == 2 and "run prior.py" in capsys.readouterr().err
