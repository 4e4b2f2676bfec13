"""The tool that runs experiments: populations, students, a replaced function; one .csv and its page."""
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import prior
from data import loader
from infra.config import from_args
from infra.files import read_json
from results import claims, claims_page, experiments, plans
from tests.conftest import MICRO


def test_a_plan_is_run_once_and_tabulated(tmp_path, monkeypatch):
    flags = tuple(f"--{k}={v}" for k, v in {**MICRO, "trajectories": 1, "cycles": 3}.items())
    # the student stays the best member, from which it starts
    still = "train.rate_multipliers = lambda *_: (0.0, 0.0)"
    one = plans.Variant("one teaches", flags=flags)
    taught = plans.Variant("a student", flags=flags, change=still, of="one",
                                 student=("--student_teachers=2", "--student_epochs=0.5"))
    plan = dict(one=one, taught=taught), [("taught", "best", "one", "learned")]
    monkeypatch.setitem(experiments.PLANS, "small", plan)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    arguments = ["small", str(tmp_path / "runs"), "--seeds=42,1042", "--jobs=2"]
    experiments.main(arguments)
    rows = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert {(r["text"], r["variant"], r["seed"], float(r["epochs"])) for r in rows} == {
        ("manual", variant, seed, epochs) for variant, epochs in (("one", 1.5), ("taught", 2.0))
        for seed in ("42", "1042")}
    of = {(r["variant"], r["seed"], r["rule"], int(r["K"])): float(r["val_loss"]) for r in rows}
    found = read_json(tmp_path / "runs" / "manual" / "one_42" / "prior.json")
    assert {(a["rule"], a["K"]): a["val_loss"] for a in found["answers"]} == {
        key[2:]: loss for key, loss in of.items() if key[:2] == ("one", "42")}
    assert all(of["taught", seed, "best", 1] == of["one", seed, "best", 1] for seed in ("42", "1042"))
    differ = [of["taught", seed, "best", 1] - of["one", seed, "learned", 3] for seed in ("42", "1042")]
    page = (tmp_path / "small.md").read_text()
    assert f"| {differ[0]:+.4f}, {differ[1]:+.4f} |" in page and still in page
    monkeypatch.setattr(experiments, "scripts", lambda names, *_: names == "prepare" or pytest.fail("twice"))
    experiments.main(arguments)
    assert (tmp_path / "small.md").read_text() == page
    experiments.main(["small"])                                         # the page anew, from the .csv alone
    assert (tmp_path / "small.md").read_text() == page


def test_what_the_claims_need_is_measured(tmp_path, monkeypatch):
    """Against sums written out: mixtures, their diversity, averaged weights, weights fitted on another text."""
    flags = tuple(f"--{k}={v}" for k, v in {**MICRO, "trajectories": 3, "cycles": 1}.items())
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for name, variant, texts in (("epochs", "q0_32", ["other=manual"]), ("ablations", "noise_none", [])):
        monkeypatch.setitem(experiments.PLANS, name, ({variant: plans.Variant(name, flags=flags)}, []))
        experiments.main([name, str(tmp_path), *texts, "--seeds=42", "--jobs=1"])
    monkeypatch.setattr("sys.argv", ["claims.py", str(tmp_path), "manual=manual", "other=manual"])
    claims.main()
    claims.main()                                                       # adds nothing
    rows = list(csv.DictReader((tmp_path / "claims.csv").open()))
    of = {(r["what"], int(r["n"])): float(r["val_loss"]) for r in rows
          if (r["text"], r["variant"]) == ("manual", "q0_32")}
    assert len({(r["text"], r["variant"], r["what"], r["n"]) for r in rows}) == len(rows)
    run = claims.Run(plans.Variant("", flags=flags), tmp_path / "manual" / "q0_32_42", "manual")
    p = run.scores["val"].double().exp().numpy()
    assert of["first", 2] == pytest.approx(-np.log(p[:2].mean(0)).mean())
    assert of["last", 1] == pytest.approx(-np.log(p[2]).mean())
    first, *two = [run.run.load_member(t, 0)[0] for t in range(3)]
    halves = {name: (two[0][name].float() + two[1][name].float()) / 2 for name in first}
    assert of["average", 2] == pytest.approx(-float(loader.score(run.model(halves), run.data.val, 2).mean()))
    idx = torch.from_numpy(run.data.val[:32, :-1].astype(np.int64))
    log_p = [run.model(state)(idx).double().log_softmax(-1) for state in (first, *two)]
    kl = [(a.exp() * (a - b)).sum(-1).mean().item() for a, b in itertools.permutations(log_p, 2)]
    assert of["kl", 3] == pytest.approx(np.mean(kl), rel=1e-6)
    answers = read_json(run.run.path / "prior.json")["answers"]         # the other text is the same one here
    [loss] = {of[what] for what in (("other all", 3), ("abroad all", 3), ("at home all", 3),
                                    ("tokens all", run.scores["fit"].size(1)))}
    assert loss == pytest.approx(next(a["val_loss"] for a in answers if (a["rule"], a["K"]) == ("learned", 3)))
    [documents] = [float(r["val_loss"]) for r in rows if r["what"] == "documents"]
    assert documents == 0                                               # both variants are the same one here
    alike = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(1)) - 3
    run.scores = dict(zip(("fit", "val"), alike))                       # members that all get weight
    w, log_p = prior.fit_weights(alike[0])[0].numpy(), alike[1].double().numpy()
    assert w.min() > 0.1 and next(claims.diversity(run))[1::2] == (3, pytest.approx(-w @ log_p.mean(1)))


def test_the_further_split_has_the_other_documents(tmp_path):
    text = Path(experiments.further_text(tmp_path)["further"])
    further = [json.loads(line)["text"].encode() for line in text.open()]
    config, _ = from_args([plans.TINY, f"--data_dir={tmp_path / 'manual' / 'data'}"], "")
    used = [bytes(document[1:].astype(np.uint8)) for tokens, starts in (
        loader.read_tokens(config, split) for split in ("val", "train"))
        for document in np.split(tokens, starts[1:])]
    assert len(further) + len(used) == 401
    assert not any(whole.startswith(document) for whole in further for document in used)


def test_the_pooled_variance_is_the_mean_of_all_pairs():
    losses = np.random.default_rng(0).normal(size=(5, 3)) + np.arange(5)[:, None]        # variants, seeds
    runs = {f"v{i}": {str(s): (0.0, y) for s, y in enumerate(row)} for i, row in enumerate(losses)}
    pairs = [np.var(a - b, ddof=1) for a, b in itertools.combinations(losses, 2)]
    assert claims_page.pooled(runs) == (pytest.approx(np.mean(pairs)), 8)
