"""Sampling from mixtures: probabilities are the weighted sum, K members cost K passes, what is refused."""
from types import SimpleNamespace

import pytest
import torch

from infra.run_directory import load_prior
from tools import generate


class Fixed(torch.nn.Module):
    """Always the same next-token probabilities; notes the length of every context that it is asked."""
    config, device = SimpleNamespace(sequence_len=4), torch.device("cpu")

    def __init__(self, *p):
        super().__init__()
        self.logits, self.contexts = torch.tensor(p).log(), []

    def forward(self, idx):
        self.contexts.append(idx.shape)
        return self.logits.expand(1, idx.size(1), -1)


def sample(models, weights, stop=-1, **changes):
    return generate.sample(models, weights, [0], SimpleNamespace(**{**generate.OPTIONS, **changes}), stop)


def test_the_mixture_is_the_weighted_sum_of_probabilities():
    models = [Fixed(0.7, 0.2, 0.1), Fixed(0.1, 0.1, 0.8)]
    ids = torch.tensor(sample(models, [0.25, 0.75], tokens=4000, temperature=1.0, top_k=0))
    assert (torch.bincount(ids) / 4000).tolist() == pytest.approx([0.25, 0.125, 0.625], abs=0.03)
    for model in models:
        assert model.contexts == [(1, min(n, 4)) for n in range(1, 4001)]


def test_temperature_top_k_seed_and_stop():
    p, equal = torch.tensor([0.5, 0.3, 0.2]), torch.full((4,), 0.25)
    assert generate.next_probabilities(p, 0.5, 0).tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    assert generate.next_probabilities(p, 1.0, 2).tolist() == pytest.approx([0.625, 0.375, 0])
    assert generate.next_probabilities(equal, 1.0, 1).tolist().count(0) == 3        # ties do not widen it
    assert generate.next_probabilities(p, 0.0, 0).tolist() == [1, 0, 0]
    one, other, third = (sample([Fixed(0.4, 0.3, 0.3)], [1.0], sample_seed=seed) for seed in (1, 1, 2))
    assert one == other != third
    assert sample([Fixed(1e-9, 1e-9, 1.0)], [1.0], stop=2) == [2]


def test_a_line_for_each_and_its_price(population, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)             # another user's run: it is only read
    for flags, labels in (
            ([], ["best member (1 pass a token)", "mixture of 4, 3 with weight (3 passes a token)"]),
            (["--member=0,1"], ["member 0,1"]), (["--student"], ["student"])):
        capsys.readouterr()
        generate.main([*population[1], *flags, "--tokens=5", "--prompt=If "])
        lines = capsys.readouterr().out.replace('"', "'").splitlines()
        assert [line[:line.index(": 'If ")] for line in lines] == labels


def test_a_prior_of_other_members_is_refused(population, monkeypatch, refused):
    other = load_prior(population[0] / "run")
    other["members"][1]["weights_sha256"] = "0" * 64
    monkeypatch.setattr(generate, "load_prior", lambda run_dir: other)
    assert "run prior.py" in refused(generate.main, population[1])
