"""tests.parity on the public script's facts, and on altered copies, where it must fail."""
import json
import re

import pytest

from model import CHUNK_BYTES
from tests import parity
from tests.conftest import ROOT

PATH = ROOT / "tests" / "data" / "slowrun_facts.json"
FACTS = json.loads(PATH.read_text())
READ = re.compile(rf"({parity.INPUTS}|muon.matrices.*|.*lr_mult|prior.top_k.*)$")      # by our side, too
LOSS = re.compile(r"loss|cross_entropy|\.mtp$|kl_times_T2|best_single")


def changed(value, change, name=""):
    """The facts with change(name, value) in the place of every number, text and flat list (None: gone)."""
    if isinstance(value, dict):
        new = {key: changed(of, change, f"{name}.{key}".lstrip(".")) for key, of in value.items()}
        return {key: of for key, of in new.items() if of is not None}
    if isinstance(value, list) and isinstance(value[0], dict):
        return [changed(of, change, f"{name}.{i}") for i, of in enumerate(value)]
    return change(name, value)


def out(facts):
    return {name for name, _, _, difference, allowed in parity.compare(facts) if not difference <= allowed}


def altered(name, value):
    """A loss by 1 part in 1000, other numbers by a tenth, of a list the last one."""
    if isinstance(value, list):
        return [*value[:-1], altered(name, value[-1])]
    if isinstance(value, str):
        return value + "x"
    return value * 1.001 if LOSS.search(name) else value * 1.1 + 0.01


def test_every_altered_or_missing_quantity_is_found():
    names = parity.flatten(FACTS).keys()
    read = {name for name in names if READ.match(name)}
    left = {name for name in read if re.search(r"(row|column)_norms|top_k.*loss", name)}    # compared, too
    facts = changed(FACTS, lambda name, value: altered(name, value) if name not in read - left else value)
    found = {name.removesuffix(".entries") for name in out({**facts, "surprise": 1.0})}
    assert found >= {*(names - read), *left, "surprise"} and len(found) > 800
    assert out(changed(FACTS, lambda name, value: value if name in read else None)) == names - read


@pytest.mark.parametrize("changes, parts", [
    ({"seed": 21, "noise.scale": 0.2002}, {
        "forward", "optimizer", "muon", "distillation", "prior", "data_order", "noise"}),
    ({"config.n_embd": None, "muon.matrices.1.shape": None, "prior.top_k.4.weights": None,
      "optimizer.steps.2.lr_mult": None, "distillation.temperature": 1.3},
     {"forward", "noise", "muon", "prior", "optimizer", "distillation"}),
    ({"forward.iha.cross_entropy": float("nan"), "muon.lr": "9.2"}, {"forward", "muon"}),
])
def test_an_altered_or_missing_input_is_found(changes, parts):
    assert {name.split(".")[0] for name in out(changed(FACTS, changes.get))} >= parts


def test_the_facts_hold(tmp_path, capsys, monkeypatch):
    """Also where the head takes 50 of the 128 tokens at once, and Muon 3 of the matrices."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 320 * 50)
    monkeypatch.setattr("optim.STACK", 3 * 64 * 64)
    code = parity.main([str(PATH)])
    assert capsys.readouterr().out.splitlines()[-1] == "913 quantities, 0 out, missing or unknown"
    assert code == 0
    (tmp_path / "altered.json").write_text(json.dumps({**FACTS, "batch": [2, 65]}))
    assert parity.main([str(PATH), str(tmp_path / "altered.json")]) == 1
    assert capsys.readouterr().out.endswith("913 quantities, 1 out, missing or unknown: batch\n")
