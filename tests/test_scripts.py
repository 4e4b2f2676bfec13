"""The product as a user meets it: scripts end to end, run.sh and torchrun, tools on what they leave."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import distill
import prior
import train
from data import prepare
from infra.config import from_args
from infra.files import read_json, write_json, write_tensors
from model import GPT
from tests.conftest import ROOT, arguments, error_line, population_of, read, tree
from tools import generate, import_slowrun, plan, plot

# this python is the active one
ENVIRONMENT = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
EIGHT = [(t, c) for t in range(2) for c in range(4)]


def run(*command, cwd=None, **environment):
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **environment},
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def by_run_sh(tmp_path_factory):
    """
    A micro population by ./run.sh: (folder, arguments, what it printed). It is called from a folder of the
    caller's, with relative paths, where nothing resolves the host's own name (containers, laptops off line)
    and torchrun is told of more machines (Kubeflow).
    """
    folder = tmp_path_factory.mktemp("caller")
    (folder / "data").mkdir()                                   # of the caller's: not to be mistaken for ours
    (folder / "data" / "__init__.py").write_text("raise SystemExit(1)")
    argv = arguments(folder, data_dir="text", run_dir="out")
    offline = ["unshare", "-rnu", "bash", "-c", 'ip link set lo up && hostname nowhere && exec "$@"', "-"]
    with_namespaces = shutil.which("unshare") and run(*offline, "true").returncode == 0
    done = run(*offline if with_namespaces else (), ROOT / "run.sh", *argv[1:], cwd=folder, PET_NNODES="2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, argv, done.stdout


@pytest.fixture
def finished(by_run_sh, tmp_path, monkeypatch):
    """(arguments, run directory) of a copy of it, the test's to change."""
    folder, argv, _ = by_run_sh
    monkeypatch.chdir(folder)
    shutil.copytree("out", tmp_path / "out")
    return [*argv, f"--run_dir={tmp_path / 'out'}"], tmp_path / "out"


def test_run_sh_goes_all_the_way(by_run_sh):
    folder, _, out = by_run_sh
    assert {p.name for p in (folder / "text").iterdir()} == {
        "manual_train.pt", "manual_val.pt", "manual_bytes.safetensors", "manual.json", ".lock"}
    assert {p.name for p in (folder / "out").iterdir()} == {
        "config.json", "metrics.jsonl", "prior.json", "prior.png", "scores", "trajectory_00", "trajectory_01",
        ".lock"}
    modes = {p.stat().st_mode for p in folder.rglob("*") if p.is_file()}
    assert modes == {(folder / "data" / "__init__.py").stat().st_mode}      # whom the umask lets read, reads
    assert re.search(r"\nbest member.*\nmixture of.*\nresults are in out.*\n$", out)
    assert (folder / "out" / "prior.png").read_bytes()[:4] == b"\x89PNG"
    if os.cpu_count() > 1:
        assert "at a time: 2" in out                            # one process per trajectory, through torchrun
    # each member was scored once; what the loop logs of the fitness set is to watch it by
    lines = list(map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines()))
    for kind, losses in (("cycle", {"fit_loss"}), ("score", {"fit_loss", "val_loss"})):
        found = [line for line in lines if line["kind"] == kind]
        assert sorted((x["trajectory"], x["cycle"]) for x in found) == EIGHT
        assert all({key for key in x if key.endswith("loss")} == losses for x in found)


def test_prior_json_holds_what_it_promises(finished):
    argv, folder = finished
    result = json.loads((folder / "prior.json").read_text())
    assert [(m["trajectory"], m["cycle"]) for m in result["members"]] == EIGHT
    assert {a["rule"] for a in result["answers"]} >= {"best", "uniform", "topk", "learned"}
    assert sorted(a["K"] for a in result["answers"] if a["rule"] == "learned") == [1, 2, 4, 8]
    assert {rule: len(of["val"]) for rule, of in result["losses"].items()}.items() >= {
        "best": 1, "uniform": 8, "topk": 8, "learned": 8}.items()
    assert [(g["cycle"], g["epochs"]) for g in result["growing"]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    config, data, population = population_of(argv)
    model, log_p = GPT(config).eval(), {"fit": [], "val": []}
    for t, c in population.members():                           # scored again, one by one, in float64
        model.load_state_dict(population.load_member(t, c)[0])
        for split in log_p:
            rows = torch.from_numpy(getattr(data, split).astype(np.int64))
            with torch.no_grad():
                all_p = torch.log_softmax(model(rows[:, :-1]).double(), -1)
            log_p[split].append(all_p.gather(-1, rows[:, 1:, None]).flatten())
    log_p = {split: torch.stack(rows) for split, rows in log_p.items()}

    def nats(answer, split):
        weights = torch.tensor(answer["weights"], dtype=torch.float64)
        return -(weights @ log_p[split][answer["members"]].exp()).log()
    tokens, best = np.bincount(data.val_documents), nats(result["answers"][0], "val")
    size = torch.from_numpy((data.val[:, 1:].ravel() < 256).astype(int))    # bytes: the separator has none
    for split in log_p:
        losses = (-log_p[split].mean(dim=1)).tolist()
        assert [m[f"{split}_loss"] for m in result["members"]] == pytest.approx(losses, abs=1e-5)
    for a in result["answers"]:
        assert len(a["members"]) == len(a["weights"]) == a["K"]
        assert math.fsum(a["weights"]) == pytest.approx(1, abs=1e-12)
        for split in log_p:
            assert a[f"{split}_loss"] == result["losses"][a["rule"]][split][a["K"] - 1]
            assert a[f"{split}_loss"] == pytest.approx(nats(a, split).mean().item(), abs=1e-5)
        more = np.bincount(data.val_documents, nats(a, "val") - best)
        n, residual = len(tokens), more - tokens * more.sum() / tokens.sum()
        error = math.sqrt((residual ** 2).sum() * n / max(1, n - 1)) / tokens.sum()
        assert a["val_error"] == (None if n < 2 else pytest.approx(error, abs=1e-6))
        assert a["val_perplexity"] == pytest.approx(math.exp(a["val_loss"]))
        bits = (nats(a, "val") * size).sum() / (math.log(2) * size.sum())
        assert a["val_bits_per_byte"] == pytest.approx(bits.item(), rel=1e-5)


def test_everything_again_changes_no_file(finished, by_run_sh):
    argv, folder = finished
    before, data = tree(folder), tree(by_run_sh[0])
    for script in (prepare, train, distill):
        script.main(argv)
    assert tree(folder) == before and tree(by_run_sh[0]) == data
    prior.main(argv)                                            # fits again, scores nothing again
    after, (_, fitted) = tree(folder), before.pop(folder / "prior.json")
    assert after.pop(folder / "prior.json")[1] == fitted and after == before
    shutil.rmtree(folder / "scores")
    prior.main(argv)                                            # one rank scores as two did
    assert (folder / "prior.json").read_bytes() == fitted


def test_a_member_that_changed_is_scored_again(finished):
    argv, folder = finished
    population, scores = population_of(argv)[2], sorted((folder / "scores").glob("*/01_003*"))
    before = [path.read_bytes() for path in scores]
    weights, about = population.load_member(1, 3)
    about = {name: about[name] for name in ("epochs", "fit_loss")}
    population.save_member(1, 3, {n: w * 1.01 for n, w in weights.items()}, **about)
    prior.main(argv)
    assert len(scores) == 2 and not any(path.read_bytes() == old for path, old in zip(scores, before))
    population.save_member(1, 3, weights, **about)
    prior.main(argv)
    assert [path.read_bytes() for path in scores] == before


def test_validation_scores_choose_nothing(finished):
    """With noise in their place, every member, weight and fitness loss stays."""
    argv, folder = finished
    before = read_json(folder / "prior.json")
    for path in (folder / "scores" / "val").iterdir():
        tensors, about = read(path)
        noise = torch.empty_like(tensors["log_p"]).exponential_(1 / 3).neg()
        write_tensors(path, "val scores", {"log_p": noise}, weights_sha256=about["weights_sha256"])
    prior.main(argv)
    after = read_json(folder / "prior.json")
    assert before["answers"][0]["val_loss"] != after["answers"][0]["val_loss"]
    for key in ("answers", "growing"):
        before[key], after[key] = ([{name: value for name, value in row.items() if name[:3] != "val"}
                                    for row in result[key]] for result in (before, after))
        assert before[key] == after[key]


@pytest.fixture
def snapshots(finished, tmp_path):
    """The members as the public script would have written them, in every way: (argv for them, folder)."""
    argv, _ = finished
    population, folder = population_of(argv)[2], tmp_path / "checkpoints"
    folder.mkdir()
    for i, (t, c) in enumerate(population.members()):
        prefix, written = ("", "module.", "_orig_mod.", "module._orig_mod.")[i % 4], {}
        for name, w in population.load_member(t, c)[0].items():
            if i % 3 or not name.startswith("mtp_"):
                name = name.replace(".attn.", "._orig_mod.attn.") if i > 3 else name
                written[prefix + name] = w.float() if i % 2 else w
        torch.save(written, folder / f"model_{i}.pt")
    return [*argv, f"--run_dir={tmp_path / 'foreign'}", f"--snapshots={folder}"], folder


def test_snapshots_of_the_public_script_become_members(snapshots, finished, tmp_path, capsys, refused):
    argv, folder = snapshots
    # an MTP head of another kind is no matter, nor is a file of another name
    other = {**torch.load(folder / "model_5.pt"), "module.mtp_proj.weight": torch.zeros(3, 3)}
    torch.save(other, folder / "model_5.pt")
    torch.save({}, folder / "model_08.pt")
    before = tree(folder)
    import_slowrun.main(argv)
    prior.main(argv[:-1])
    ours, theirs = (read_json(path / "prior.json") for path in (finished[1], tmp_path / "foreign"))
    for m in ours["members"] + theirs["members"]:
        del m["weights_sha256"]
    assert all(theirs[key] == ours[key] for key in ("answers", "growing", "members"))
    assert tree(folder) == before
    assert "members of its own" in refused(import_slowrun.main, argv)
    generate.main([*argv[:-1], "--tokens=3", "--K=2"])
    plot.main(argv[:-1])
    assert "mixture of 2" in capsys.readouterr().out
    for path in (tmp_path / "foreign" / "trajectory_00").glob("cycle_00[1-3]*"):
        path.unlink()
    # not even the first is trained over
    assert "trajectory_00' has members but no checkpoint" in refused(train.main, argv[:-1])


@pytest.mark.parametrize("name, change, words", [
    ("model_3.pt", lambda weights: {"model_state_dict": {}}, ["no snapshot"]),
    ("model_3.pt", lambda weights: [torch.zeros(1)], ["no snapshot"]),
    ("model_3.pt", lambda weights: {n: w.int() for n, w in weights.items()}, ["no snapshot"]),
    ("model_3.pt", lambda weights: weights | {f"module.{n}": w for n, w in weights.items()}, ["twice"]),
    ("model_3.pt", lambda weights: {"w": os.system}, ["not readable"]),
    ("model_3.pt", lambda weights: {**weights, "transformer.wte.weight": torch.zeros(50304, 32)},
     ["tokenizer", "wte.weight", "([50304, 32]) from checkpoint", "current model is torch.Size([320, 32])"]),
    ("model_3.pt", lambda weights: {n: w for n, w in weights.items() if "lambdas" not in n},
     ['Missing key(s) in state_dict: "resid_lambdas"']),
    ("model_8.pt", lambda weights: {}, ["model_0.pt .. model_7.pt", "cycles"]),
])
def test_what_is_wrong_with_snapshots(name, change, words, snapshots, tmp_path, refused):
    argv, folder = snapshots
    torch.save(change(torch.load(folder / "model_0.pt")), folder / name)
    err = refused(import_slowrun.main, argv)
    assert all(word in err for word in [name, *words]) and not (tmp_path / "foreign").exists(), err


def test_a_person_sees_the_picture_beside_others(finished, tmp_path, refused):
    argv, folder = finished
    result = read_json(folder / "prior.json")
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "prior.json", {**result, "text": {**result["text"], "val_tokens": 7}})
    assert "val_tokens" in refused(plot.main, [*argv, f"--beside={tmp_path / 'other'}"])
    result["text"]["data"] = "na\udcefve $x^{$.txt"             # a name in Latin-1, with dollars
    learned = [a for a in result["answers"] if a["rule"] == "learned"]
    result["answers"] += [{**a, "rule": "newest", "val_error": None} for a in learned]      # another's rule
    write_json(folder / "prior.json", result)
    (folder / "prior.png").unlink()
    plot.main([*argv, "--beside=out"])
    assert (folder / "prior.png").stat().st_size > 10_000
    (folder / "trajectory_01" / "cycle_003.safetensors").unlink()
    prior.main(argv)                                            # an unfinished population has its picture
    plot.main(argv)
    assert len(read_json(folder / "prior.json")["members"]) == 7


def test_what_the_environment_holds_is_not_for_tools(finished, monkeypatch, capsys):
    """Of torchrun's or a notebook's: each is one process, waits for no other and prints whatever its rank."""
    argv, folder = finished
    torchrun = dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delattr(torch.distributed, "init_process_group")
    for tool, words in ((prepare, "holds it already"), (generate, "best member"), (plot, "prior.png"),
                        (plan, "parameters")):
        tool.main(argv)
        assert words in capsys.readouterr().out
    (folder / "prior.png").unlink()
    done = run(sys.executable, "-m", "tools.plot", *argv, PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1",
               MPLBACKEND="a notebook's")
    assert done.returncode == 0 and (folder / "prior.png").exists(), done.stderr


# ------------------------------------------------------------------------------------------ run.sh, torchrun

def test_wherever_the_clone_lies(tmp_path):
    """And checked out as for Windows."""
    first, name = tmp_path / "a:b", "a b \u00fc'"
    ours = shutil.ignore_patterns(".git", ".venv", "runs", "*.pt", "__pycache__")
    shutil.copytree(ROOT, first, ignore=ours)
    done = run(first / "run.sh")
    assert done.returncode == 2 and "a:b" in error_line(done.stderr) and "colon" in done.stderr
    for command in (["init", "-q"], ["add", "."],
                    ["-c", "core.autocrlf=true", "checkout-index", "-a", f"--prefix={tmp_path / name}/"]):
        assert run("git", *command, cwd=first).returncode == 0
    (tmp_path / "link.sh").symlink_to(tmp_path / name / "run.sh")
    for command, environment in ((f"{name}/run.sh", dict(CDPATH=".")), (tmp_path / "link.sh", {})):
        done = run("bash", command, "--seed=none", cwd=tmp_path, **environment)
        assert done.returncode == 2 and "seed='none'" in error_line(done.stderr), done.stderr


def test_a_half_made_environment_is_no_environment(tmp_path):
    """Of a package whose installation was cut short there is all that an import wants, but no metadata."""
    usable = re.search("usable='(.*?)'\n", (ROOT / "run.sh").read_text(), re.S)[1]
    for name in "torch numpy safetensors tiktoken datasets pytest matplotlib tqdm".split():
        for file in (f"{name}/__init__.py", f"{name}-2.11.dist-info/METADATA"):
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).write_text(f"Name: {name}\nVersion: 2.11" if "METADATA" in file else "")
    ask = (sys.executable, "-IS", "-c", f"import sys; sys.path.append('{tmp_path}')\n{usable}")
    assert run(*ask).returncode == 0
    shutil.rmtree(tmp_path / "datasets-2.11.dist-info")
    assert run(*ask).returncode == 1


def test_run_sh_refuses_before_anything_starts(tmp_path):
    (tmp_path / "another").mkdir()
    write_json(tmp_path / "another" / "config.json", {"identity": {"seed": 5}})
    before = tree(tmp_path)
    for flags, words in ((["--run_dir=another"], "seed is 5 there and 42 here"),
                         (["--data=nowhere.txt"], "nowhere.txt"), (["--seed=1", "none.py"], "'none.py'")):
        done = run(ROOT / "run.sh", *flags, cwd=tmp_path, LOCAL_RANK="1")         # a cluster's
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run(ROOT / "run.sh", "--seed=1", "none.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "CONFIG" in done.stdout and not done.stderr and tree(tmp_path) == before


def test_torchrun_prints_one_line(ready, tmp_path):
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *ready(trajectories=1, batch_tokens=96))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "start 1 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", [dict(PYTHONIOENCODING="ascii"),
                                         dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_any_encoding_of_the_terminal_will_do(environment, ready, tmp_path):
    argv = ready(trajectories=1, cycles=1, epochs_per_cycle=0.1, run_dir=tmp_path / "\u4e16\u754c")
    done = run(sys.executable, ROOT / "train.py", *argv, **environment)
    assert done.returncode == 0 and "next: " in done.stdout, done.stderr


def test_other_data_under_a_run(finished, tmp_path, refused):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of another text" for i in range(400)))
    for script in (prepare, prior):
        argv = [*finished[0], f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path / 'data'}"]
        assert "data_fingerprint" in refused(script.main, argv)


def test_help_says_what_a_script_does(capsys):
    without_docstrings = partial(from_args, usage=None)                    # python -OO
    for call in (prepare.main, train.main, distill.main, prior.main, plot.main, without_docstrings):
        with pytest.raises(SystemExit) as stop:
            call(["--help"])
        assert stop.value.code == 0 and re.search("CONFIG|configs/tiny.py", capsys.readouterr().out)
