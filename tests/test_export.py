"""An exported folder, in a fresh process of transformers, against our own model, generation and tokenizer."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import get_tokenizer
from infra.config import from_args
from infra.files import WRITING, read_json
from model import GPT
from tests.conftest import ROOT, population_of, read
from tools import export, generate

WEIGHTS = {(0, 0): 0.25, (0, 2): 0.6, (1, 1): 0.15}
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
found, ids = {}, torch.load(sys.argv[1])
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.tensor([[256, *"If é ".encode()]])
    text = model.generate(prompt, max_new_tokens=50, do_sample=False)[0].tolist()
    assert model.generate(max_new_tokens=5, do_sample=False)[0, 0] == 256       # as on the card
    with torch.no_grad():
        out = model(ids, labels=ids)
        mask = torch.tensor([[1] * ids.size(1) + [0] * 5] * len(ids))
        padded = model(torch.cat([ids, ids[:, :5]], 1), mask)
    refused = []
    for bad in (dict(input_ids=ids, attention_mask=ids * 0), dict(input_ids=torch.cat([ids, ids], 1))):
        try:
            model(**bad)
        except ValueError as e:
            refused.append(str(e))
    found[folder] = dict(logits=out.logits, loss=out.loss, padded=padded.logits, text=text, refused=refused)
torch.save(found, sys.argv[2])
"""


def exported(argv, folder, *args):
    export.main([*argv, "--ids", f"--to={folder}", *args])
    return folder


def member_path(run, t, c):
    return run / f"trajectory_{t:02d}" / f"cycle_{c:03d}.safetensors"


@torch.no_grad()
def own_logits(path, ids, argv):
    """Of the member in this file, by the training's own class."""
    model = GPT(from_args(argv, "")[0]).eval()
    model.load_state_dict({name: w.float() for name, w in read(path)[0].items()})
    return model(ids)


def test_a_fresh_process_gives_our_logits_and_our_text(population, tmp_path, capsys):
    pytest.importorskip("transformers", reason="it is missing: pip install -r requirements-export.txt")
    run, argv = population[0] / "run", population[1]
    args = {"mixture": ["--K=4"], "member": ["--member=1,2"], "student": ["--student"]}
    folders = [exported(argv, tmp_path / name, *of) for name, of in args.items()]
    ids = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, tmp_path / "ids.pt", tmp_path / "out.pt", *folders]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **environment})
    found, decode = dict(zip(args, torch.load(tmp_path / "out.pt").values())), get_tokenizer("bytes")[1]
    members = [own_logits(member_path(run, t, c), ids, argv) for t, c in WEIGHTS]
    for name, path in (("member", member_path(run, 1, 2)), ("student", member_path(run / "student", 0, 0))):
        assert torch.equal(found[name]["logits"], own_logits(path, ids, argv))
    mixed = sum(w * z.double().softmax(-1) for w, z in zip(WEIGHTS.values(), members)).log()
    torch.testing.assert_close(found["mixture"]["logits"].double(), mixed, atol=2e-6, rtol=0)
    for name, of in args.items():
        got = found[name]
        torch.testing.assert_close(got["padded"][:, :20], got["logits"], atol=1e-5, rtol=0)
        p = got["logits"].double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
        assert got["loss"].item() == pytest.approx(-p.mean().item(), abs=1e-5)
        assert "padding" in got["refused"][0] and "32" in got["refused"][1]
        capsys.readouterr()
        generate.main([*argv, "--prompt=If é ", "--tokens=50", "--temperature=0", *of])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(repr(decode(got["text"]))), (name, last, got["text"])


def test_the_same_bytes_twice_and_a_card_of_what_it_is(population, tmp_path):
    for name in (f"{WRITING}99999999", ".writing-elsewhere-99999999"):       # left by a kill here, and there
        (tmp_path / name).mkdir()
    one, two = (exported(population[1], tmp_path / name, "--K=4") for name in ("one", "two"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writing-elsewhere-99999999", "one", "two"]
    assert sorted(p.name for p in one.iterdir()) == [
        "LICENSE", "README.md", "config.json", "generation_config.json", "model.py", "model.safetensors",
        "modeling_q0.py"]
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
        assert path.stat().st_mode & 0o777 == (one / "model.py").stat().st_mode & 0o777
    assert (one / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert not [name for name in load_file(one / "model.safetensors") if "mtp_" in name]
    run, card = population[0] / "run", (one / "README.md").read_text()
    for member, weight in WEIGHTS.items():
        sha256 = read(member_path(run, *member))[1]["tensors_sha256"]
        assert f"| {member[0]} | {member[1]} | {weight} | {sha256} |" in card
    facts = "| 5.2500 | 0.0125 |", "3 forward passes", "| 42, 43 |", "2 trajectories x 3 cycles x 0.1 epochs"
    text, code = read_json(run / "prior.json")["text"], read_json(run / "config.json")["code"]
    for fact in (*facts, text["text_sha256"], code):
        assert fact in card, fact
    assert str(run.parent) not in card + (one / "config.json").read_text()
    assert "tokenizer in this folder" not in card
    student = (exported(population[1], tmp_path / "three", "--student") / "README.md").read_text()
    best = min(read_json(run / "prior.json")["members"], key=lambda m: m["fit_loss"])
    names = "student/scores/val/00_000", f"scores/val/{best['trajectory']:02d}_{best['cycle']:03d}"
    gain = np.subtract(*(read(run / f"{of}.safetensors")[0]["log_p"].double().numpy() for of in names))
    sums, sizes = (np.bincount(population_of(population[1])[1].val_documents, of) for of in (gain, np.ones(len(gain))))
    error = np.sqrt(np.var(sums - gain.mean() * sizes, ddof=1) * len(sizes)) / len(gain)
    for fact in (f"| {error:.4f} |", f"best member | {best['fit_loss']:.4f} | {best['val_loss']:.4f} | - |",
                 *facts[2:], "teachers: 3, "):
        assert fact in student, fact


def test_its_tokenizer_gives_our_ids(micro, tmp_path):
    transformers, config = pytest.importorskip("transformers"), from_args(micro(tokenizer="gpt2"), "")[0]
    try:
        encode = get_tokenizer("gpt2")[0]
    except SystemExit:
        pytest.skip("GPT-2's ranks are not here: connect once, or set TIKTOKEN_CACHE_DIR")
    contents = export.model_files(config, [1.0]) | export.tokenizer_files(config)
    export.write_folder(tmp_path / "exported", contents, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    manual = "".join(json.loads(line)["text"] for line in (ROOT / "data" / "manual.jsonl").open())[:100_000]
    draw = random.Random(0)
    odd = "".join(chr(draw.choice([draw.randrange(32, 0xd800), draw.randrange(0xe000, 0x20000)]))
                  for _ in range(2000))
    for text in ("", "  two  spaces\r\n\n\tand <|endoftext|> in it\n", manual, odd):
        assert tokenizer(text).input_ids == [config.vocab_size - 1, *encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("args, names", [
    (["--to=../full"], ["'../full'", "empty"]),
    (["--to=../full/file"], ["'../full/file'", "empty"]),
    (["--to=../here"], ["'../here'", "the one you are in"]), ([], ["to=''"]), (["--to=new"], ["tokenizer=bytes", "--ids"]),
    (["--to=new", "--ids", "--K=4", "--member=0,0"], ["--K, --member"]),
    (["--to=new", "--ids", "--member=0,0", "--student"], ["--student"]),
    (["--to=new", "--ids", "--K=7"], ["K=7", "1, 2, 4, 6"]),
])
def test_bad_requests_are_refused(args, names, population, tmp_path, monkeypatch, refused):
    for name in ("full", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    line = refused(export.main, [*population[1], *args])
    assert all(name in line for name in names), line
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "here"]


def test_without_transformers_the_line_says_how_to_install_it(micro, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "transformers.convert_slow_tokenizer", None)       # missing
    line = refused(export.tokenizer_files, from_args(micro(tokenizer="gpt2"), "")[0])
    assert "pip install -r" in line and "requirements-export.txt" in line
