"""The tool that runs experiments: populations, a student of one, a replaced function, resumed, one .csv and its page."""
import csv
import json

import pytest

from results import experiments
from tests.conftest import MICRO


def test_a_plan_is_run_once_and_tabulated(tmp_path, monkeypatch, capsys):
    flags = tuple(f"--{k}={v}" for k, v in {**MICRO, "trajectories": 1, "cycles": 3}.items())
    one = experiments.Variant("one teaches", flags=flags)
    quiet = experiments.Variant("no noise", flags=flags, change="train.noise_scale = lambda cycle, cycles: 0.0")
    taught = experiments.Variant("a student", flags=flags, of="one", student=("--student_teachers=2", "--student_epochs=0.5"))
    monkeypatch.setitem(experiments.PLANS, "small", (dict(one=one, quiet=quiet, taught=taught), [("quiet", "learned", "one", "learned")]))
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    arguments = ["small", str(tmp_path / "runs"), "--seeds=42,1042", "--jobs=2"]
    experiments.main(arguments)
    rows = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert {(r["text"], r["variant"], r["seed"]) for r in rows} == {
        ("manual", v, s) for v in ("one", "quiet", "taught") for s in ("42", "1042")}
    assert {(r["variant"], float(r["epochs"])) for r in rows} == {("one", 1.5), ("quiet", 1.5), ("taught", 2.0)}
    prior = json.loads((tmp_path / "runs" / "manual" / "one_42" / "prior.json").read_text())
    learned = next(a for a in prior["answers"] if (a["rule"], a["K"]) == ("learned", 3))
    of = {(r["text"], r["variant"], r["seed"], r["rule"], int(r["K"])): float(r["val_loss"]) for r in rows}
    assert of["manual", "one", "42", "learned", 3] == learned["val_loss"] != of["manual", "quiet", "42", "learned", 3]
    differ = [of["manual", "quiet", s, "learned", 3] - of["manual", "one", s, "learned", 3] for s in ("42", "1042")]
    page = (tmp_path / "small.md").read_text()
    assert f"| {differ[0]:+.4f}, {differ[1]:+.4f} |" in page and "train.noise_scale = lambda" in page
    monkeypatch.setattr(experiments, "scripts", lambda names, *_: None if names == "prepare" else pytest.fail("nothing is done twice"))
    experiments.main(arguments)
    assert (tmp_path / "small.md").read_text() == page
    experiments.main(["small"])                                         # the page anew, from the .csv alone
    assert (tmp_path / "small.md").read_text() == page
