"""tests.parity on the public script's facts, and on altered copies, where it must fail."""
import copy
import json

import pytest

from tests import parity
from tests.conftest import ROOT

FACTS = json.loads((ROOT / "tests" / "data" / "slowrun_facts.json").read_text())


def out(facts):
    return {name for name, _, _, difference, allowed in parity.compare(facts) if not difference <= allowed}


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def alter(facts, path, change):
    *parents, last = path
    for key in parents:
        facts = facts[key]
    facts[last] = change(facts[last])


def test_every_quantity_agrees():
    assert out(FACTS) == set()
    assert len(parity.compare(FACTS)) > 900


def test_altered_losses_are_found():
    facts, altered = copy.deepcopy(FACTS), set()
    for path, value in leaves(FACTS):
        if (isinstance(value, float)
                and ("loss" in path[-1] or path[-1] in ("cross_entropy", "mtp", "kl_times_T2", "best_single"))
                and path[0] in ("forward", "optimizer", "distillation", "prior")
                and path[-1] != "mtp_weight" and path[2:] != ("mtp",)):
            alter(facts, path, lambda v: v * 1.001)
            altered.add(".".join(map(str, path)))
    assert len(altered) > 20
    assert altered <= out(facts)


def test_altered_muon_norms_are_found():
    for change in (lambda v: [x * 1.1 for x in v], lambda v: [*v[:-1], v[-1] * 1.1], lambda v: [v[0] * 0.9, *v[1:]]):
        facts = copy.deepcopy(FACTS)
        for matrix in facts["muon"]["matrices"]:
            matrix["row_norms"], matrix["column_norms"] = change(matrix["row_norms"]), change(matrix["column_norms"])
        found = out(facts)
        for i in range(3):
            for side in ("row", "column"):
                assert {f"muon.matrices.{i}.{side}_norms", f"muon.matrices.{i}.{side}_norms.entries"} & found, (i, side)


@pytest.mark.parametrize("path", [
    ("forward", "iha", "cross_entropy"),
    ("forward", "plain"),
    ("forward", "iha_mtp", "iha"),
    ("forward", "iha_mtp", "grad_norm", "lm_head.weight"),
    ("optimizer", "steps", 1, "grad_norm"),
    ("optimizer", "delta_norm"),
    ("rates", "x0_lambdas", "betas"),
    ("muon",),
    ("distillation", "kl_times_T2"),
    ("prior", "top_k", "4"),
    ("prior", "optimum_loss"),
    ("data_order", "trajectories", 1, "epochs", 2, "sha256"),
    ("noise", "parameters", "lm_head.weight"),
    ("seed",),
    ("config", "n_embd"),
    ("parameter_order",),
])
def test_a_missing_quantity_is_found(path):
    facts = copy.deepcopy(FACTS)
    *parents, last = path
    holder = facts
    for key in parents:
        holder = holder[key]
    del holder[last]
    assert out(facts)


@pytest.mark.parametrize("path, change", [
    (("seed",), lambda v: v + 1),
    (("noise", "cycle"), lambda v: v + 1),
    (("noise", "scale"), lambda v: v * 1.001),
    (("config", "vocab_size"), lambda v: v + 1),
    (("distillation", "temperature"), lambda v: v * 1.1),
    (("muon", "lr"), lambda v: v * 1.1),
    (("rates", "lm_head.weight", "betas"), lambda v: [0.9, 0.95]),
    (("data_order", "trajectories", 0, "epochs", 0, "first_8_tokens"), lambda v: v[::-1]),
    (("parameter_order",), lambda v: v[::-1]),
    (("forward", "plain", "params"), lambda v: v + 1),
    (("forward", "iha", "logits_0_5_first8"), lambda v: v[::-1]),
    (("prior", "top_k", "2", "loss"), lambda v: v * 1.001),
    (("optimizer", "steps"), lambda v: v[:2]),
    (("forward", "iha", "cross_entropy"), lambda v: float("nan")),
    (("forward", "iha", "cross_entropy"), lambda v: "9.2"),
])
def test_an_altered_quantity_is_found(path, change):
    facts = copy.deepcopy(FACTS)
    alter(facts, path, change)
    assert out(facts)


def test_an_unknown_quantity_is_found():
    assert out({**copy.deepcopy(FACTS), "surprise": 1.0}) == {"surprise"}


def test_exit_codes(tmp_path, capsys):
    assert parity.main([str(ROOT / "tests" / "data" / "slowrun_facts.json")]) == 0
    altered = tmp_path / "altered.json"
    altered.write_text(json.dumps({**FACTS, "distillation": {**FACTS["distillation"], "loss": 9.0}}))
    assert parity.main([str(altered)]) == 1
    assert "distillation.loss" in capsys.readouterr().out.splitlines()[-1]
