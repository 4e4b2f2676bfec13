"""
The product as a user meets it: scripts end to end, run.sh and torchrun, and bad input (one line, exit code 2, nothing
changed).
"""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import distill
import prior
import train
from infra.config import from_args
from data import loader, prepare
from model import GPT
from infra.files import read_json, to_json, write_json, write_tensors
from infra.run_directory import RunDirectory
from tests.conftest import ROOT, error_line, read
from tools import generate, import_slowrun, plan, plot

# this python is the active one
ENVIRONMENT = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


def run(*command, cwd=None, **environment):
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True,
                          text=True, timeout=300)


def tree(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """
    A finished micro population by ./run.sh, called from a folder of the caller's with relative paths: (folder, argv, output).
    """
    from tests.conftest import MICRO
    folder = tmp_path_factory.mktemp("caller")
    (folder / "data").mkdir()                                   # of the caller's: not to be mistaken for ours
    (folder / "data" / "loader.py").write_text("raise SystemExit('the caller's module was imported')")
    flags = [f"--{k}={v}" for k, v in {**MICRO, "data_dir": "text", "run_dir": "out"}.items()]
    done = run(ROOT / "run.sh", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [str(ROOT / "configs" / "tiny.py"), *flags], done


def test_run_sh_goes_all_the_way(finished):
    folder, argv, done = finished
    assert {p.name for p in (folder / "text").iterdir()} == {
        "manual_train.pt", "manual_val.pt", "manual_bytes.safetensors", "manual.json", ".lock"}
    assert {"config.json", "metrics.jsonl", "prior.json", "prior.png", "scores", "trajectory_00", "trajectory_01",
            ".lock"} == {p.name for p in (folder / "out").iterdir()}
    best, mixture, where = done.stdout.splitlines()[-3:]
    assert best.startswith("best member") and mixture.startswith("mixture of") and "results are in out" in where
    assert (folder / "out" / "prior.png").read_bytes()[:4] == b"\x89PNG"
    if os.cpu_count() > 1:
        assert "at a time: 2" in done.stdout                     # one process per trajectory, through torchrun


def test_prior_json_holds_what_it_promises(finished, monkeypatch):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    result = json.loads((folder / "out" / "prior.json").read_text())
    assert [(m["trajectory"], m["cycle"]) for m in result["members"]] == [(t, c) for t in range(2) for c in range(4)]
    assert {a["rule"] for a in result["answers"]} >= {"best", "uniform", "topk", "learned"}
    assert sorted(a["K"] for a in result["answers"] if a["rule"] == "learned") == [1, 2, 4, 8]
    assert {rule: len(of["val"]) for rule, of in result["losses"].items()}.items() >= {
        "best": 1, "uniform": 8, "topk": 8, "learned": 8}.items()
    assert [(g["cycle"], g["epochs"]) for g in result["growing"]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    config = from_args(argv, "")[0]
    data = loader.load(config)
    population, model, log_p = RunDirectory(config, data.fingerprint), GPT(config), {"fit": [], "val": []}
    for t, c in population.members():                           # scored again, one by one, in float64
        model.load_state_dict(population.load_member(t, c)[0])
        for split in log_p:
            rows = torch.from_numpy(getattr(data, split).astype(np.int64))
            with torch.no_grad():
                logits = model.eval()(rows[:, :-1]).double()
            log_p[split].append(torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None]).flatten())
    for split in log_p:
        log_p[split] = torch.stack(log_p[split])
        assert [m[f"{split}_loss"] for m in result["members"]] == pytest.approx((-log_p[split].mean(dim=1)).tolist(), abs=1e-5)
        for a in result["answers"]:
            weights = torch.tensor(a["weights"], dtype=torch.float64)
            assert len(a["members"]) == len(weights) == a["K"] and weights.sum().item() == pytest.approx(1, abs=1e-12)
            assert a[f"{split}_loss"] == result["losses"][a["rule"]][split][a["K"] - 1]
            assert a[f"{split}_loss"] == pytest.approx(
                -(weights @ log_p[split][a["members"]].exp()).log().mean().item(), abs=1e-5)
    best = result["answers"][0]
    size = np.bincount(data.val_documents)
    for a in result["answers"]:
        of = lambda answer: -(torch.tensor(answer["weights"], dtype=torch.float64)
                              @ log_p["val"][answer["members"]].exp()).log().numpy()
        per_document = np.bincount(data.val_documents, of(a) - of(best))
        residual = per_document - size * per_document.sum() / size.sum()
        assert a["val_error"] is None if len(size) < 2 else a["val_error"] == pytest.approx(
            np.sqrt((residual ** 2).sum() * len(size) / (len(size) - 1)) / size.sum(), abs=1e-6)
        assert a["val_perplexity"] == pytest.approx(math.exp(a["val_loss"]))
        size_of = (data.val[:, 1:].ravel() < 256).astype(int)           # bytes of every target: the separator has none
        assert a["val_bits_per_byte"] == pytest.approx((of(a) * size_of).sum() / (math.log(2) * size_of.sum()), rel=1e-5)


def test_everything_again_changes_no_file(finished, monkeypatch):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    before = tree(folder)
    for script in (prepare, train, distill):
        script.main(argv)
    assert tree(folder) == before
    scores = {p: stamp for p, stamp in before.items() if "scores" in p.parts}
    prior.main(argv)                                            # fits again, scores nothing again
    after = tree(folder)
    assert scores and all(after[p] == stamp for p, stamp in scores.items())
    assert after[folder / "out" / "prior.json"][1] == before[folder / "out" / "prior.json"][1]


def test_no_member_is_scored_twice(finished):
    """By prior.py; what the loop logs of the fitness set is to watch it by."""
    folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    for kind, losses in (("cycle", {"fit_loss"}), ("score", {"fit_loss", "val_loss"})):
        found = [(x["trajectory"], x["cycle"]) for x in lines if x["kind"] == kind]
        assert sorted(found) == [(t, c) for t in range(2) for c in range(4)]
        assert all({key for key in x if key.endswith("loss")} == losses for x in lines if x["kind"] == kind)


def test_a_member_that_changed_is_scored_again(finished, tmp_path, monkeypatch):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    config = from_args(argv, "")[0]
    population = RunDirectory(config, loader.load(config).fingerprint)
    path = population.member_path(1, 3)
    kept = path.read_bytes()
    scores = lambda: [(folder / "out" / "scores" / split / "01_003.safetensors").read_bytes() for split in ("fit", "val")]
    before = scores()
    weights, about = population.load_member(1, 3)
    population.save_member(1, 3, {n: w * 1.01 for n, w in weights.items()}, epochs=about["epochs"], fit_loss=about["fit_loss"])
    prior.main(argv)
    assert not any(new == old for new, old in zip(scores(), before))
    path.write_bytes(kept)
    prior.main(argv)
    assert scores() == before


def test_validation_scores_choose_nothing(finished, monkeypatch):
    """With noise in their place, every member, weight and fitness loss stays."""
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    path = folder / "out" / "prior.json"
    kept, scores = path.read_bytes(), {p: p.read_bytes() for p in (folder / "out" / "scores" / "val").iterdir()}
    for p in scores:
        tensors, about = read(p)
        noise = torch.empty_like(tensors["log_p"]).exponential_(1 / 3).neg()
        write_tensors(p, "val scores", {"log_p": noise}, weights_sha256=about["weights_sha256"])
    prior.main(argv)
    before, after = json.loads(kept), json.loads(path.read_bytes())
    for p, content in scores.items():
        p.write_bytes(content)
    path.write_bytes(kept)
    assert before["answers"][0]["val_loss"] != after["answers"][0]["val_loss"]
    choices = lambda result: ([(a["K"], a["rule"], a["members"], a["weights"], a["fit_loss"]) for a in result["answers"]]
                              + [g["fit_loss"] for g in result["growing"]])
    assert choices(before) == choices(after)


def test_an_unfinished_population_is_weighed_as_it_is(finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    path, kept = folder / "out" / "prior.json", (folder / "out" / "prior.json").read_bytes()
    hidden = (folder / "out" / "trajectory_01" / "cycle_003.safetensors").rename(folder / "hidden.pt")
    try:
        prior.main(argv)
        assert "7 of 8 members" in capsys.readouterr().out and len(json.loads(path.read_text())["members"]) == 7
        plot.main(argv)
    finally:
        hidden.rename(folder / "out" / "trajectory_01" / "cycle_003.safetensors")
        path.write_bytes(kept)


def test_one_rank_gives_what_two_gave(finished, tmp_path, monkeypatch):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "out", tmp_path / "out", ignore=shutil.ignore_patterns("scores", "prior.json"))
    prior.main([*argv, f"--run_dir={tmp_path / 'out'}"])
    one, two = (json.loads((p / "out" / "prior.json").read_text()) for p in (tmp_path, folder))
    assert one["members"] == two["members"] and one["answers"] == two["answers"]


@pytest.fixture
def snapshots(finished, tmp_path, monkeypatch):
    """The finished members as the public script would have written them, in every way it may: (argv for them, folder)."""
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    config = from_args(argv, "")[0]
    population = RunDirectory(config, loader.load(config).fingerprint)
    (tmp_path / "checkpoints").mkdir()
    for i, (t, c) in enumerate(population.members()):
        weights, _ = population.load_member(t, c)
        prefix = ("", "module.", "_orig_mod.", "module._orig_mod.")[i % 4]
        name = lambda n: prefix + (n.replace(".attn.", "._orig_mod.attn.") if i > 3 else n)
        weights = {name(n): w.float() if i % 2 else w for n, w in weights.items() if i % 3 or not n.startswith("mtp_")}
        torch.save(weights, tmp_path / "checkpoints" / f"model_{i}.pt")
    return [*argv, f"--run_dir={tmp_path / 'foreign'}", f"--snapshots={tmp_path / 'checkpoints'}"], tmp_path / "checkpoints"


def test_snapshots_of_the_public_script_become_members(snapshots, finished, tmp_path, capsys):
    argv, folder = snapshots
    before = tree(folder)
    # an MTP head of another kind is no matter
    torch.save({**torch.load(folder / "model_5.pt"), "module.mtp_proj.weight": torch.zeros(3, 3)}, folder / "model_5.pt")
    import_slowrun.main(argv)
    prior.main(argv[:-1])
    ours, theirs = (json.loads((p / "prior.json").read_text()) for p in (finished[0] / "out", tmp_path / "foreign"))
    alike = lambda rows: [{k: v for k, v in row.items() if k != "weights_sha256"} for row in rows]
    assert theirs["answers"] == ours["answers"] and theirs["growing"] == ours["growing"] and (
        alike(theirs["members"]) == alike(ours["members"]))
    assert {p: v for p, v in tree(folder).items() if "5" not in p.name} == {p: v for p, v in before.items() if "5" not in p.name}
    capsys.readouterr()
    assert "members of its own" in refused(lambda: import_slowrun.main(argv), capsys)
    with pytest.raises(SystemExit):                             # they are not trained over
        train.main(argv[:-1])
    assert "no checkpoint" in error_line(capsys.readouterr().err)
    generate.main([*argv[:-1], "--tokens=3", "--K=2"])
    plot.main(argv[:-1])
    assert "mixture of 2" in capsys.readouterr().out


@pytest.mark.parametrize("change, names", [
    (lambda f: (f / "model_3.pt").write_bytes((f / "model_3.pt").read_bytes()[:5000]), ["model_3.pt", "not readable"]),
    (lambda f: torch.save({"model_state_dict": {}}, f / "model_3.pt"), ["model_3.pt", "no snapshot"]),
    (lambda f: torch.save([torch.zeros(1)], f / "model_3.pt"), ["model_3.pt", "no snapshot"]),
    (lambda f: torch.save({n: w.int() for n, w in torch.load(f / "model_2.pt").items()}, f / "model_3.pt"),
     ["model_3.pt", "no snapshot"]),
    (lambda f: torch.save({p + n: w for n, w in torch.load(f / "model_0.pt").items() for p in ("", "module.")},
                          f / "model_3.pt"), ["model_3.pt", "twice"]),
    (lambda f: torch.save({"w": os.system}, f / "model_3.pt"), ["model_3.pt", "not readable"]),
    (lambda f: torch.save({**torch.load(f / "model_0.pt"), "transformer.wte.weight": torch.zeros(50304, 32)}, f / "model_3.pt"),
     ["model_3.pt", "tokenizer", "wte.weight", "([50304, 32]) from checkpoint", "current model is torch.Size([320, 32])"]),
    (lambda f: torch.save({n: w for n, w in torch.load(f / "model_2.pt").items() if "lambdas" not in n}, f / "model_3.pt"),
     ["model_3.pt", 'Missing key(s) in state_dict: "resid_lambdas"']),
    (lambda f: torch.save({}, f / "model_8.pt"), ["model_8.pt", "model_0.pt .. model_7.pt", "cycles"]),
    (lambda f: [p.rename(f / p.name.replace("model_", "model_0")) for p in f.iterdir()], ["no model_0.pt"]),
])
def test_what_is_wrong_with_snapshots(change, names, snapshots, tmp_path, capsys):
    argv, folder = snapshots
    change(folder)
    before = tree(folder)
    with pytest.raises(SystemExit) as stop:
        import_slowrun.main(argv)
    err = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and all(name in err for name in names), err
    assert tree(folder) == before and not (tmp_path / "foreign").exists()


def test_a_person_sees_the_picture_beside_others(finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    plot.main([*argv, "--beside=out"])
    assert (folder / "out" / "prior.png").stat().st_size > 10_000
    assert "prior.py" in refused(lambda: plot.main([*argv, "--beside=nowhere"]), capsys)
    path = folder / "out" / "prior.json"
    kept = path.read_text()
    other = read_json(path)
    (folder / "elsewhere").mkdir()
    write_json(folder / "elsewhere" / "prior.json", {**other, "text": {**other["text"], "val_tokens": 7}})
    assert "val_tokens" in refused(lambda: plot.main([*argv, "--beside=elsewhere"]), capsys)
    other["text"]["data"] = "na\udcefve $x^{$.txt"             # a name in Latin-1, with dollars
    for a in [a for a in other["answers"] if a["rule"] == "learned"]:       # a rule that the picture has never heard of
        other["answers"].append({**a, "rule": "newest", "val_error": None})
    write_json(path, other)
    plot.main(argv)
    path.write_text(kept)


def test_the_picture_needs_no_backend_of_anyones(finished):
    folder, argv, _ = finished
    (folder / "out" / "prior.png").unlink()
    done = run(sys.executable, "-m", "tools.plot", *argv, cwd=folder, PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1", MPLBACKEND="a notebook's")
    assert done.returncode == 0 and (folder / "out" / "prior.png").exists(), done.stderr


def test_what_torchrun_left_in_the_environment_is_not_for_tools(finished, monkeypatch, capsys):
    """They are one process each: they wait for no other, and print whatever rank they are said to be."""
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr(torch.distributed, "init_process_group")
    for main, words in ((prepare.main, "holds it already"), (generate.main, "best member"), (plot.main, "prior.png"),
                        (plan.main, "parameters")):
        main(argv)
        assert words in capsys.readouterr().out


@pytest.mark.skipif(subprocess.run(["unshare", "-rnu", "ip", "link", "set", "lo", "up"], capture_output=True).returncode != 0
                    if shutil.which("unshare") and shutil.which("ip") else True, reason="wants namespaces of its own")
def test_a_host_whose_name_nothing_resolves(finished, tmp_path):
    """Containers, laptops off line: two ranks meet all the same."""
    folder, argv, _ = finished
    command = shlex.join(map(str, [ROOT / "run.sh", *argv, f"--run_dir={tmp_path / 'out'}", "--distill_from=1", "--cycles=1"]))
    offline = f"hostname nowhere; ip link set lo up; exec timeout 100 {command}"
    done = run("unshare", "-rnu", "bash", "-c", offline, cwd=folder)
    assert done.returncode == 0 and "at a time: 2" in done.stdout, done.stderr[-2000:]


def test_a_checkout_for_windows_runs(tmp_path):
    for name in ("run.sh", ".gitattributes"):
        shutil.copy(ROOT / name, tmp_path)
    for command in (["init", "-q"], ["add", "."], ["-c", "core.autocrlf=true", "checkout-index", "-a", "--prefix=out/"]):
        assert run("git", *command, cwd=tmp_path).returncode == 0
    assert "CONFIG" in run(tmp_path / "out" / "run.sh", "--help").stdout


def test_wherever_the_clone_lies(tmp_path):
    for name in ("a:b", "a b \u00fc'"):
        shutil.copytree(ROOT, tmp_path / name, ignore=shutil.ignore_patterns(".*", "runs", "*.pt", "__pycache__"))
    done = run(tmp_path / "a:b" / "run.sh")
    assert done.returncode == 2 and "a:b" in error_line(done.stderr) and "colon" in done.stderr
    (tmp_path / "link.sh").symlink_to(tmp_path / name / "run.sh")
    for command, environment in ((f"{name}/run.sh", dict(CDPATH=".")), (tmp_path / "link.sh", {})):
        done = run("bash", command, "--seed=none", cwd=tmp_path, **environment)
        assert done.returncode == 2 and "seed='none'" in error_line(done.stderr), done.stderr


# ------------------------------------------------------------------------------------------- bad input

def refused(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_scripts_out_of_turn(micro, tmp_path, capsys):
    for script in (train, distill, prior):
        assert "python -m data.prepare" in refused(lambda: script.main(micro()), capsys)
    prepare.main(micro())
    capsys.readouterr()
    before = tree(tmp_path)
    assert "run train.py" in refused(lambda: distill.main(micro()), capsys)
    assert "no members" in refused(lambda: prior.main(micro()), capsys)
    assert "prior.py" in refused(lambda: plot.main(micro()), capsys)
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, names", [
    (dict(n_embd=64), ["n_embd is 32 there and 64 here"]),
    (dict(cycles=8), ["cycles"]),
    (dict(seed=1), ["seed"]),
    (dict(distill_alpha=0.7), ["distill_alpha"]),
    (dict(dropout=0.2, lr_scale=0.1), ["dropout", "lr_scale"]),
])
def test_a_run_directory_of_another_config(change, names, finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    before = tree(folder)
    for script in (train, distill, prior):
        err = refused(lambda: script.main([*argv, *(f"--{k}={v}" for k, v in change.items())]), capsys)
        assert all(name in err for name in [*names, "run_dir"]), err
    assert tree(folder) == before


def test_other_data_under_a_run(finished, tmp_path, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of another text" for i in range(400)))
    argv = [*argv, f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path / 'data'}"]
    for script in (prepare, prior):
        assert "data_fingerprint" in refused(lambda: script.main(argv), capsys)


@pytest.mark.parametrize("key, value", [("tokenizer", "gpt2"), ("fitness_tokens", 999), ("data_fingerprint", "0" * 64)])
def test_members_of_another_tokenizer_or_fitness_set(key, value, finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    config = from_args(argv, "")[0]
    population = RunDirectory(config, loader.load(config).fingerprint)
    path = population.member_path(0, 2)
    kept = path.read_bytes()
    weights, about = population.load_member(0, 2)
    population.identity = {**population.identity, key: value}
    population.save_member(0, 2, weights, epochs=1, fit_loss=about["fit_loss"])
    try:
        err = refused(lambda: prior.main(argv), capsys)
        assert "cycle_002.safetensors" in err and f"{key} is {value} there" in err
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", np.nan, 500.0])
def test_damaged_scores_are_named(content, finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    path = folder / "out" / "scores" / "fit" / "01_002.safetensors"
    kept = path.read_bytes()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors, about = read(path)
        log_p = tensors["log_p"].clone()
        log_p[5] = content
        save_file({"log_p": log_p}, path, metadata={"about": to_json(about, about["kind"])})
    try:
        assert "01_002.safetensors" in refused(lambda: prior.main(argv), capsys)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"[1]", lambda b: b""])
@pytest.mark.parametrize("file", ["trajectory_00/cycle_001.safetensors", "config.json"])
def test_damaged_files_are_named(file, damage, finished, monkeypatch, capsys):
    folder, argv, _ = finished
    monkeypatch.chdir(folder)
    path = folder / "out" / file
    kept = path.read_bytes()
    path.write_bytes(damage(kept))
    try:
        err = refused(lambda: prior.main(argv), capsys)
        assert path.name in err
    finally:
        path.write_bytes(kept)


def test_run_sh_refuses_before_anything_starts(tmp_path):
    (tmp_path / "of_another").mkdir()
    write_json(tmp_path / "of_another" / "config.json", {"identity": {"seed": 5}})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"format": 2}')              # of an older version, perhaps
    for flags, name in ((["--run_dir=of_another"], "seed is 5 there and 42 here"), (["--run_dir=/proc/none"], "run_dir"), (["--run_dir=damaged"], "damaged/config.json"),
                        (["--cylces=3"], "cycles"), ([tmp_path / "none.py"], "none.py"),
                        (["--micro_batch=0"], "micro_batch"), (["--data=nowhere.txt"], "nowhere.txt")):
        done = run(ROOT / "run.sh", *flags, cwd=tmp_path)
        assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "config.json", "damaged", "of_another"]
    done = run(ROOT / "run.sh", "--seed=1", "none.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "CONFIG" in done.stdout and not done.stderr
    done = run(ROOT / "run.sh", "--seed=1", "none.py", cwd=tmp_path)
    assert done.returncode == 2 and "none.py" in done.stderr and "tiny.py" not in done.stderr.split(";")[0]


def test_torchrun_prints_one_line(micro, tmp_path):
    prepare.main(micro())
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py",
               *micro(trajectories=1, batch_tokens=96))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "start 1 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_says_what_a_script_does(capsys):
    for script in (prepare, train, distill, prior, plot):
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        assert stop.value.code == 0 and "CONFIG" in capsys.readouterr().out.replace("configs/tiny.py", "CONFIG")
