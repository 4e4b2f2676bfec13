"""tests.parity on the public script's facts, and on altered copies, where it must fail."""
import copy
import json

import pytest

from tests import parity
from tests.conftest import ROOT

PATH = ROOT / "tests" / "data" / "slowrun_facts.json"
FACTS = json.loads(PATH.read_text())
LOSSES = {"cross_entropy", "mtp", "kl_times_T2", "best_single"}         # and what has loss in its name


def leaves(value, path=()):
    """(path, value) of every number, text and flat list."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, (*path, key))


def out(changes):
    """The names that are out where each path of the facts is what its function makes of it (None: gone)."""
    facts = {**copy.deepcopy(FACTS), "surprise": 1.0}
    for (*parents, last), change in changes.items():
        holder = facts
        for key in parents:
            holder = holder[key]
        if change:
            holder[last] = change(holder[last])
        else:
            del holder[last]
    found = {name for name, _, _, difference, allowed in parity.compare(facts) if not difference <= allowed}
    assert "surprise" in found
    return found - {"surprise"}


def test_every_altered_quantity_is_found():
    changes = {path: lambda v: v * 1.001 for path, value in leaves(FACTS)
               if isinstance(value, float) and ("loss" in path[-1] or path[-1] in LOSSES)
               and (path[0] != "forward" or path[-1] != "mtp")}
    assert len(changes) > 20
    for i, change in enumerate((lambda v: [x * 1.1 for x in v], lambda v: [*v[:-1], v[-1] * 1.1],
                                lambda v: [v[0] * 0.9, *v[1:]])):
        changes |= {("muon", "matrices", i, f"{side}_norms"): change for side in ("row", "column")}
    changes |= {("muon", "lr"): lambda v: v * 1.1, ("rates", "lm_head.weight", "betas"): lambda v: v[::-1],
                ("data_order", "trajectories", 0, "epochs", 0, "first_8_tokens"): lambda v: v[::-1],
                ("parameter_order",): lambda v: v[::-1], ("forward", "plain", "params"): lambda v: v + 1,
                ("forward", "iha", "logits_0_5_first8"): lambda v: v[::-1],
                ("noise", "parameters", "lm_head.weight", "sum"): lambda v: v + 0.01,
                ("forward", "iha", "logits_std"): lambda v: float("nan"),
                ("forward", "iha_mtp", "logits_shape"): lambda v: "9.2"}
    found = {name.removesuffix(".entries") for name in out(changes)}
    assert {".".join(map(str, path)) for path in changes} <= found


def test_a_missing_quantity_is_found():
    gone = [("forward", "iha", "cross_entropy"), ("forward", "iha_mtp", "grad_norm", "lm_head.weight"),
            ("optimizer", "steps", 1, "grad_norm"), ("rates", "x0_lambdas", "betas"),
            ("distillation", "kl_times_T2"), ("prior", "optimum_loss"), ("parameter_order",),
            ("data_order", "trajectories", 1, "epochs", 2, "sha256")]
    assert out(dict.fromkeys(gone)) == {".".join(map(str, path)) for path in gone}
    assert {"muon", "prior", "forward", "optimizer", "noise.parameters.lm_head.weight.sum"} <= out({
        ("muon",): None, ("prior", "top_k", "4"): None, ("forward", "plain"): None,
        ("optimizer", "steps"): lambda v: v[:2], ("noise", "parameters", "lm_head.weight"): None})


@pytest.mark.parametrize("changes, parts", [
    ({("seed",): lambda v: v + 1}, {"forward", "optimizer", "muon", "distillation", "prior", "data_order"}),
    ({("noise", "cycle"): lambda v: v + 1, ("distillation", "temperature"): lambda v: v * 1.1},
     {"noise", "distillation"}),
    ({("noise", "scale"): lambda v: v * 1.001, ("forward", "iha_mtp", "iha"): None}, {"noise", "forward"}),
    ({("config", "vocab_size"): lambda v: v + 1}, {"forward"}),
    ({("config", "n_embd"): None}, {"forward", "noise"}),
    ({("seed",): None}, {"forward", "muon", "data_order"})])
def test_an_input_that_is_altered_or_missing_is_found(changes, parts):
    assert parts <= {name.split(".")[0] for name in out(changes)}


def test_exit_codes(tmp_path, capsys):
    assert parity.main([str(PATH)]) == 0
    assert capsys.readouterr().out.endswith("913 quantities, 0 out, missing or unknown\n")
    (tmp_path / "altered.json").write_text(json.dumps({**FACTS, "batch": [2, 65]}))
    assert parity.main([str(PATH), str(tmp_path / "altered.json")]) == 1
    assert capsys.readouterr().out.endswith("913 quantities, 1 out, missing or unknown: batch\n")
