"""The tool that runs experiments: populations, students, a replaced function; one .csv and its page."""
import csv

import pytest

from infra.files import read_json
from results import experiments, plans
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
    prior = read_json(tmp_path / "runs" / "manual" / "one_42" / "prior.json")
    assert {(a["rule"], a["K"]): a["val_loss"] for a in prior["answers"]} == {
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
