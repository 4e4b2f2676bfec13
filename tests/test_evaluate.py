"""Downstream accuracy and data efficiency. Tests that need lm-evaluation-harness skip where it is missing."""
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import prior
import train
from data import prepare
from infra.config import from_args, student_of
from infra.files import read_json, write_json
from infra.run_directory import RunDirectory
from prior import load_member, model_to_score
from tests.conftest import MICRO, ROOT, error_line
from tools import efficiency, evaluate

QUESTIONS = {
    "arc_easy": [dict(id="1", question="Ice melts into", answerKey="B", choices=dict(text=["stone", "water"], label=["A", "B"])),
                 dict(id="2", question="Birds have", answerKey="A", choices=dict(text=["wings", "fins", "ink"], label=["A", "B", "C"])),
                 dict(id="3", question="At night we see", answerKey="1", choices=dict(text=["the moon", "noon"], label=["1", "2"]))],
    "piqa": [dict(goal="Open a jar", sol1="Turn the lid.", sol2="Fill it with sand, bury it, and then wait for thirty long years.", label=0),
             dict(goal="Dry a cup", sol1="Sink it.", sol2="Wipe it.", label=1)],
    "sciq": [dict(question="What is blue?", support="The sky is blue.", distractor1="grass", distractor2="grass", distractor3="a cat",
                  correct_answer="the sky"),
             dict(question="What is wet?", support="", distractor1="dust", distractor2="salt", distractor3="ash", correct_answer="rain")],
}


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -r requirements-eval.txt")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from tools import harness
    return harness


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for name, rows in QUESTIONS.items():
        (folder / f"{name}_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """The arguments of three finished members and a student, T = 32 bytes."""
    folder = tmp_path_factory.mktemp("evaluate")
    values = {**MICRO, "data_dir": folder / "data", "run_dir": folder / "run", "trajectories": 1, "cycles": 3,
              "student_teachers": 2, "student_epochs": 0.3}
    argv = [str(ROOT / "configs" / "tiny.py"), *(f"--{k}={v}" for k, v in values.items())]
    for script in (prepare, train, distill, prior):
        script.main(argv)
    distill.main([*argv, "--student"])
    return argv


@pytest.fixture(scope="module")
def scored(harness, population, questions):
    """(config, [(about, rows, task, lms)], the population's run directory, the members' weights)."""
    config, options = from_args([*population, f"--questions={questions}"], "", **evaluate.OPTIONS)
    asked = evaluate.ask(config, options)
    run = RunDirectory(config, None)
    members = {m: run.load_member(*m)[1]["tensors_sha256"] for m in run.members()}
    ranks = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), barrier=lambda **_: None)
    evaluate.score_members(config, members, {about["scores"]: rows for about, rows, *_ in asked}, ranks)
    return config, asked, run, dict(zip(members, (0.5, 0.2, 0.3)))


def brute_force(config, run, weights, mix, context, continuation):
    """log p of a text's bytes after an other's, token by token, each from a pass of its own in float64."""
    total, done = 0.0, {}
    for j, target in enumerate(continuation):
        piece = j // config.sequence_len * config.sequence_len              # pieces of T targets, the last one shorter
        end = min(piece + config.sequence_len, len(continuation))
        ids = [*context, *continuation][:len(context) + j]
        seen = ids[max(0, len(context) + end - config.sequence_len - 1):]
        p = []
        for member, w in weights.items():
            model = done.setdefault(member, model_to_score(config).eval())
            if model.cos.dtype != torch.float64:
                load_member(model, run, *member)
                model.double()
            with torch.no_grad():
                z = model.hidden(torch.tensor([seen]))[0, -1] @ model.lm_head.weight.T
            p.append((15 * torch.tanh(z[:config.vocab_size] / 15)).log_softmax(0)[target].item())
        w = np.array(list(weights.values()))
        total += w @ p if mix == "paper" else math.log(w @ np.exp(p))
    return total


@pytest.mark.parametrize("mix", ["one", "tokens", "paper"])
def test_every_choice_is_that_of_a_brute_force_in_float64(mix, scored):
    config, asked, run, weights = scored
    weights = {(0, 1): 1.0} if mix == "one" else weights
    separator, longer = config.vocab_size - 1, 0
    for about, rows, task, lms in asked:
        for lm in lms:
            lm.log_p = evaluate.mixed(run, about["scores"], rows, weights, mix)
            for instance, (found, _) in zip(task.instances, lm.loglikelihood(task.instances)):
                context, continuation = (list(text.encode()) for text in instance.args)
                context = [separator] * lm.separator + context
                assert found == pytest.approx(brute_force(config, run, weights, mix, context, continuation), abs=1e-5)
                longer += len(continuation) > config.sequence_len
    assert longer == 2


def test_batches_score_as_one_by_one(scored):
    config, asked, run, _ = scored
    model = model_to_score(config).eval()
    load_member(model, run, 0, 0)
    for _, rows, *_ in asked:
        alone, together = (evaluate.score(model, rows, size, lambda n: None) for size in (1, 10 ** 6))
        assert np.abs(alone - together).max() < 1e-5 and len(alone) == sum(n for _, n in rows)


def test_equal_choices_score_equally_and_an_empty_context_gets_one_separator(harness, scored):
    config, asked, run, weights = scored
    about, rows, task, lms = asked[-1]
    for lm in lms:
        lm.log_p = evaluate.mixed(run, about["scores"], rows, weights, "tokens")
        first = [log_p for log_p, _ in lm.loglikelihood(task.instances)][:4]
        assert first[0] == first[1] and len(set(first)) == 3
        seen = {}
        lm = harness.Adapter(config, lambda text: list(text.encode()), lm.separator, seen)
        assert lm.loglikelihood([SimpleNamespace(args=("", "ab")), SimpleNamespace(args=(" ", "b"))])[0][0] == 0
        assert list(seen) == [((256, 97, 98), 2), ((256, 32, 98), 2)]


def test_a_long_text_is_cut_as_the_harness_cuts_it(harness):
    from lm_eval.utils import get_rolling_token_windows
    for length in range(1, 40):
        text = list(range(length))
        theirs = [((*inputs, predicted[-1]), len(predicted))
                  for inputs, predicted in get_rolling_token_windows(text, 99, 8, 1)]
        assert harness.windows([99], text, 8) == theirs
    assert harness.windows([1, 2, 3, 4, 5], [6, 7], 4) == [((3, 4, 5, 6, 7), 2)]


def test_figures_are_those_of_the_harness_itself(harness, scored):
    from lm_eval.evaluator import evaluate as theirs
    config, asked, run, weights = scored
    for about, rows, task, lms in asked:
        lms[0].log_p = evaluate.mixed(run, about["scores"], rows, weights, "tokens")
        ours = harness.figures(task, lms[0])
        compared = harness.compare(ours, ours)
        theirs_of = theirs(lms[0], {"tasks": {about["task"]: task}}, bootstrap_iters=1)["results"][about["task"]]
        assert set(compared) == {"acc", "acc_norm"}
        for metric, row in compared.items():
            assert row["value"] == theirs_of[f"{metric},none"]
            assert row["error"] == pytest.approx(theirs_of[f"{metric}_stderr,none"], abs=1e-12)


def test_two_processes_share_the_members_and_a_second_call_reads_none(harness, population, questions, monkeypatch, capsys):
    argv = [*population, f"--questions={questions}", "--K=1,2,all", "--limit=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tools.evaluate"]
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    config, _ = from_args(population, "")
    first = read_json(RunDirectory(config, None).path / "evaluation.json")
    monkeypatch.setattr(evaluate, "load_member", None)          # would be called
    capsys.readouterr()
    evaluate.main(argv)
    assert read_json(RunDirectory(config, None).path / "evaluation.json") == first
    table = capsys.readouterr().out
    answers = [(a["rule"], a["K"]) for a in first["answers"]]
    assert answers == [("best", 1), ("uniform", 2), ("learned", 2), ("uniform", 3), ("learned", 3), ("student", 1)]
    assert len(first["results"]) == 3 * 2 * (2 + sum(2 if len(a["members"]) > 1 else 1 for a in first["answers"][1:-1]))
    for row in first["results"]:
        acc = row["metrics"]["acc"]
        assert acc["difference"] == acc["paired_error"] == 0 or row["rule"] != "best"
        line = f"{row['task'] + ', acc':20} {row['rule']:8} {row['K']:>3} {row['mix']:6}{acc['value']:8.4f}"
        assert line in table or not row["separator"]


def test_a_paired_error_is_that_of_the_differences(harness):
    mine, best = np.array([1, 1, 0, 1.0]), np.array([1, 0, 1, 1.0])
    row = harness.compare({"acc": (0.75, mine), "f1": (0.5, None)}, {"acc": (0.75, best), "f1": (0.25, None)})
    assert row["f1"] == {"value": 0.5} and row["acc"]["difference"] == 0
    assert row["acc"]["paired_error"] == pytest.approx(math.sqrt(2 / 3 / 4))       # of 0, 1, -1, 0


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


@pytest.mark.parametrize("args, rows, names", [
    (["--tasks=arc_esy"], None, ["arc_esy", "'arc_easy'"]),
    (["--tasks=piqa"], "", ["piqa_test.jsonl", "empty"]),
    (["--tasks=piqa"], "{", ["piqa_test.jsonl", "JSON"]),
    (["--tasks=piqa"], '{"goal": "a"}', ["piqa_test.jsonl", "columns"]),
    (["--tasks=boolq"], None, ["boolq", "boolq.jsonl"]),
    (["--tasks=lambada_openai"], '{"text": "a b c"}', ["lambada_openai", "'acc'", "greedy"]),
    (["--tasks=gsm8k"], '{"question": "1?", "answer": "#### 1"}', ["gsm8k", "generated"]),
    (["--tasks=leaderboard_mmlu_pro"], '{"question": "1?", "options": ["1", "2"], "answer": "A", "answer_index": 0}', ["few-shot"]),
    (["--K=4"], None, ["K=4", "1, 2, 3"]),
    (["--K=x"], None, ["K=x", "1, 2, 3"]),
    (["--limit=-1"], None, ["limit=-1"]),
])
def test_bad_requests_are_refused_before_a_member_is_read(args, rows, names, harness, population, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "score", None)
    if rows is not None:
        (tmp_path / f"{args[0].removeprefix('--tasks=')}_test.jsonl").write_text(rows)
    line = refused([*population, f"--questions={tmp_path}", *args], capsys)
    assert all(name in line for name in names), line


def test_other_weights_than_the_priors_are_refused(harness, population, questions, capsys):
    path = RunDirectory(from_args(population, "")[0], None).path / "prior.json"
    kept = path.read_text()
    other = read_json(path)
    for m in other["members"]:
        m["weights_sha256"] = "0" * 64
    write_json(path, other)
    line = refused([*population, f"--questions={questions}", "--tasks=sciq"], capsys)
    path.write_text(kept)
    assert "run prior.py" in line


def test_without_the_harness_the_line_says_how_to_install_it(population, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tools.harness", None)
    monkeypatch.delattr("tools.harness", raising=False)
    assert "pip install -r requirements-eval.txt" in refused(population, capsys)


# ------------------------------------------------------------------------------------------ data efficiency

@pytest.mark.parametrize("name, figure, printed", [
    ("loss", 3.0476, 9.96), ("loss", 3.0034, 11.96), ("loss", 2.987, 12.87),
    ("arc_easy", .4781, 7.9), ("piqa", .6697, 8.0), ("sciq", .7850, 13.4), ("mean", .6443, 12.2),
    ("arc_easy", .4865, 12.7), ("piqa", .6823, 17.0), ("sciq", .8030, 18.8), ("mean", .6573, 14.2),
    ("arc_easy", .4945, 13.2), ("piqa", .6774, 14.7), ("sciq", .8080, 19.9), ("mean", .6600, 16.0),
])
def test_the_multiples_that_the_paper_prints(name, figure, printed, capsys):
    efficiency.main([f"{name}={figure}"])
    words = capsys.readouterr().out.split()
    digits = len(str(printed).split(".")[1])
    assert abs(float(words[2]) - printed) <= 0.51 * 10 ** -digits + 5e-4


def test_the_same_rule_on_any_curve(tmp_path, capsys):
    path = tmp_path / "curve.csv"
    path.write_text("tokens,loss\n4000,1.5\n1000,3.0\n2000,2.0\n8000,1.75\n")
    efficiency.main([f"--curve={path}", "loss=2.5", "loss=1.625", "loss=1.0"])
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "1.500 times the tokens", "3.500 times the tokens", "outside the curve, 1.5 to 3"]


@pytest.mark.parametrize("args, names", [
    (["loss"], ["loss=:", "number"]), (["los=3"], ["'los=3'", "loss, piqa"]),
    (["--curve=CURVE", "loss=1"], ["curve=", "tokens,NAME"]), (["--curve=missing.csv", "loss=1"], ["missing.csv"]),
])
def test_bad_figures_are_refused(args, names, tmp_path, capsys):
    (tmp_path / "curve.csv").write_text("tokens,loss\n1000,x\n")
    with pytest.raises(SystemExit) as stop:
        efficiency.main([word.replace("CURVE", str(tmp_path / "curve.csv")) for word in args])
    line = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(name in line for name in names), line
