"""Preparation and loader against the rules written out again: plain loops, and what the file format promises."""
import hashlib
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from infra.config import from_args
from infra.files import lock
from data import loader, prepare, tokenizer
from tests.conftest import ROOT, error_line


def separate(tokens, starts):
    """Documents as texts, from a token file of the byte tokenizer."""
    return [bytes(d[d < 256].astype(np.uint8)).decode(errors="replace") for d in np.split(tokens, starts[1:])]


def test_no_paragraph_of_the_manual_stands_in_two_splits(micro):
    argv = micro(train_tokens=150_000, fitness_tokens=60_000, val_tokens=60_000)
    prepare.main(argv)
    config = from_args(argv, "")[0]
    val, (train, starts) = separate(*loader.read_tokens(config, "val")), loader.read_tokens(config, "train")
    fitness, rest, rest_starts = loader.split_fitness(train, starts, config.fitness_tokens)
    fitness_starts = starts[:len(starts) - len(rest_starts)]
    splits = ["\n\n".join(val), "\n\n".join(separate(fitness, fitness_starts)), "\n\n".join(separate(rest, rest_starts))]
    flat = [" ".join(s.split()) for s in splits]
    count = 0
    for i, split in enumerate(splits):
        for paragraph in re.split(r"\n\s*\n", split):
            paragraph = " ".join(paragraph.split())
            if len(paragraph) >= 40:
                count += 1
                assert not any(paragraph in other for j, other in enumerate(flat) if j != i), paragraph
    assert count > 500


def test_no_paragraph_of_the_manual_stands_in_two_documents():
    texts = prepare.source_documents([prepare.Path(prepare.MANUAL)])
    documents = [" ".join(d.split()) for d in texts]
    everything = "\n".join(documents)
    paragraphs = [" ".join(p.split()) for d in texts for p in d.split("\n\n")]
    assert len(documents) > 200 and [p for p in paragraphs if len(p) >= 40 and everything.count(p) > 1] == []
    assert 500 < sum(map(len, documents)) / len(documents) < 1500


def test_an_interrupted_preparation_leaves_nothing_that_counts(micro, tmp_path, monkeypatch, capsys):
    calls, replace = [], prepare.os.replace
    def dies(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(prepare.os, "replace", dies)
    with pytest.raises(SystemExit):
        prepare.main(micro())
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "data" / "manual_train.pt").exists()
    monkeypatch.setattr(prepare.os, "replace", replace)
    prepare.main(micro())
    assert {p.name for p in (tmp_path / "data").iterdir()} == {
        "manual_val.pt", "manual_train.pt", "manual_bytes.safetensors", "manual.json", ".lock"}
    whole = (tmp_path / "data" / "manual_train.pt").read_bytes()
    (tmp_path / "data" / "manual_train.pt").unlink()            # what is lost is written again
    prepare.main(micro())
    assert (tmp_path / "data" / "manual_train.pt").read_bytes() == whole


def test_files_of_somebody_else_are_not_written_again(micro, tmp_path, capsys):
    prepare.main(micro())
    (tmp_path / "data" / "manual.json").unlink()                # what says that they are ours
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    with pytest.raises(SystemExit) as stop:
        prepare.main(micro())
    assert stop.value.code == 2 and "_train.pt" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}


def test_the_fitness_set_is_whole_documents_cut_to_its_sequences(micro):
    prepare.main(micro())
    starts = loader.read_tokens(from_args(micro(), "")[0], "train")[1]
    for wanted in (700, 1000, 1400, int(starts[starts > 700][0])):             # the last one ends with a document
        argv = micro(fitness_tokens=wanted)
        prepare.main(argv)
        config = from_args(argv, "")[0]
        data, (tokens, starts) = loader.load(config), loader.read_tokens(config, "train")
        end = min(s for s in [*starts.tolist(), len(tokens)] if s >= wanted)
        assert data.fit.ravel().tolist() == tokens[:wanted // 33 * 33].tolist()
        assert data.train.tolist() == tokens[end:].tolist() and tokens[end] == 256


def test_the_file_format(micro, tmp_path):
    argv = micro()
    prepare.main(argv)
    config = from_args(argv, "")[0]
    for split, seed in (("val", 42), ("train", 43)):
        file = torch.load(tmp_path / "data" / f"manual_{split}.pt", weights_only=True)
        assert list(file) == ["tokens", "doc_starts", "bos_id", "seq_shuffle_seed", "seq_size"]
        assert file["tokens"].dtype == torch.uint16 and file["doc_starts"].dtype == torch.int64
        assert (file["bos_id"], file["seq_shuffle_seed"], file["seq_size"]) == (256, seed, 33)
        torch.save(file, tmp_path / f"manual_{split}.pt")           # byte for byte: the published SHA-256 are of such files
        assert (tmp_path / f"manual_{split}.pt").read_bytes() == (tmp_path / "data" / f"manual_{split}.pt").read_bytes()
        assert len(file["tokens"]) == getattr(config, f"{split}_tokens")
        starts = file["tokens"].numpy() == 256
        assert starts.nonzero()[0].tolist() == file["doc_starts"].tolist()
    about = json.loads((tmp_path / "data" / "manual.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", about["text_sha256"]) and about["tokenizer"] == "bytes"
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    prepare.main(argv)                      # reused, not written again
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}


def test_documents_of_local_files(tmp_path, capsys):
    def documents(name, content):
        (tmp_path / name).write_text(content)
        return prepare.file_documents(tmp_path / name)
    assert documents("lines.txt", "one\ntwo\n") == ["one", "two"]
    assert documents("blank.txt", "one\nmore\n \t\ntwo\n\n\n\nthree\n") == ["one\nmore", "two", "three\n"]
    assert documents("crlf.txt", "one\r\n\r\ntwo") == ["one", "two"]
    assert documents("cr.txt", "one\r\rtwo") == ["one", "two"]
    assert documents("rows.jsonl", '{"text": "a\\nb", "id": 1}\n\n{"text": "c"}\n') == ["a\nb", "c"]
    assert documents("gaps.jsonl", '{"text": null}\n{"text": " "}\n{"text": "a"}\n') == ["a"]       # null as in .parquet


def test_which_files_of_a_folder_are_read(tmp_path, micro, capsys):
    """Each real file once, through links to files and folders, too; all else is counted and said."""
    for name, content in {"a/LOUD.TXT": "loud", "a/empty.txt": "\n", "a/notes.md": "md", "a/README": "readme", "a/.hidden.txt": "hidden",
                          "a/.git/git.txt": "git", "elsewhere/deep/far.txt": "far", "elsewhere/near.txt": "near", "blob": "blob"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for link, target in {"a/corpus": "../elsewhere", "a/again.txt": "LOUD.TXT", "a/named.txt": "../blob", "elsewhere/loop": "../a"}.items():
        (tmp_path / link).symlink_to(target)
    with pytest.raises(SystemExit):                                 # too short, but read
        prepare.main(micro(data=f" {tmp_path / 'a'} , {tmp_path / 'elsewhere'},"))
    out, err = capsys.readouterr()
    assert "left out 2 hidden, 1 without an ending, 1 .md" in out and "empty.txt' is empty" in out, out
    text = "\0".join(["loud", "far", "near", "blob"])               # in the order of their paths
    assert "4 documents" in out and hashlib.sha256(text.encode()).hexdigest() in out and "too short" in err


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, micro, monkeypatch, capsys):
    (tmp_path / "a" / "closed").mkdir(parents=True)
    (tmp_path / "a" / "x.txt").write_text("x")
    iterdir = prepare.Path.iterdir
    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)
    monkeypatch.setattr(prepare.Path, "iterdir", closed)
    with pytest.raises(SystemExit):
        prepare.main(micro(data=tmp_path / "a"))
    assert "closed': Permission denied" in error_line(capsys.readouterr().err)


def test_a_clone_whose_path_has_a_comma(tmp_path, micro, monkeypatch):
    (tmp_path / "q0, a copy").mkdir()
    monkeypatch.setattr(prepare, "MANUAL", shutil.copy(prepare.MANUAL, tmp_path / "q0, a copy"))
    prepare.main(micro())


def test_two_preparations_at_once(tmp_path, micro, monkeypatch, capsys):
    """Of two on one data_dir the first that is whole stays; the other one takes it, or is told that it is another's."""
    tokenize, write = prepare.tokenize, prepare.write
    def other_is_faster(config, documents):
        monkeypatch.setattr(prepare, "tokenize", tokenize)
        prepare.main(micro())
        whole.update({p: p.read_bytes() for p in (tmp_path / "data").iterdir()})
        return tokenize(config, documents)
    def alone(*args):
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "data" / ".lock", "")
        written.append(args)
        write(*args)
    whole, written = {}, []
    monkeypatch.setattr(prepare, "write", alone)
    for argv, refused in ((micro(), False), (micro(train_tokens=2500), True)):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        whole.clear(), written.clear()
        monkeypatch.setattr(prepare, "tokenize", other_is_faster)
        try:
            prepare.main(argv)
        except SystemExit as stop:
            assert refused and stop.code == 2 and "train_tokens is 3000 there and 2500 here" in error_line(capsys.readouterr().err)
        assert len(written) == 1 and whole == {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}


def test_tokens_stand_where_their_text_is_gone(tmp_path, micro, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of the text" for i in range(400)))
    prepare.main(micro(data=text))
    text.unlink()
    prepare.main(micro(data=text))
    assert "text.txt' is gone" in capsys.readouterr().out
    for argv, words in ((micro(data=tmp_path / "typo.txt"), "typo.txt"), (micro(data=text, val_tokens=900), "val_tokens is 1800 there")):
        with pytest.raises(SystemExit):
            prepare.main(argv)
        assert words in error_line(capsys.readouterr().err)


def test_damaged_tokens_are_not_advised(tmp_path, micro, capsys):
    """Twice as long, by whatever wrote them: no line says to train on so many, nor on another tokenizer's."""
    prepare.main(micro())
    path = tmp_path / "data" / "manual_train.pt"
    file = torch.load(path)
    for tokens in (file["tokens"].repeat(2), torch.full((3000,), 300, dtype=torch.uint16)):
        torch.save({**file, "tokens": tokens}, path)
        with pytest.raises(SystemExit):
            prepare.main(micro())
        assert "not what data.prepare wrote" in error_line(capsys.readouterr().err)


def test_a_disk_that_is_full(tmp_path, micro):
    """A real one, as far as a process's limit goes: one line, what was there stays, and the same command goes on."""
    command = [sys.executable, "-m", "data.prepare", *micro()]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "could not be written" in error_line(done.stderr), done.stderr
    assert [p.name for p in sorted((tmp_path / "data").iterdir())] == [".lock", "manual.json"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_local_text_becomes_the_tokens_it_is(tmp_path, micro, capsys):
    texts = [f"document {i}: " + "xyzü" * i for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = micro(data=tmp_path / "text.txt", train_tokens=4000, val_tokens=1000)
    prepare.main(argv)
    config = from_args(argv, "")[0]
    val, train = (separate(*loader.read_tokens(config, split)) for split in ("val", "train"))
    assert all(d in texts for d in [*val[:-1], *train[:-1]]) and any(d.startswith(val[-1]) for d in texts)
    assert not set(val[:-1]) & set(train[:-1]) and len(val) > 5 and "which 0 repeat another" in capsys.readouterr().out
    assert val[:-1] != texts[:len(val) - 1]                     # shuffled
    again = micro(data=tmp_path / "text.txt", train_tokens=4000, val_tokens=1000, data_dir=tmp_path / "again")
    prepare.main(again)                                         # by a fixed seed
    assert (tmp_path / "again" / "text_train.pt").read_bytes() == (tmp_path / "data" / "text_train.pt").read_bytes()


def test_the_gpt2_tokenizer(monkeypatch, capsys):
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    small = tiktoken.Encoding("r50k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"r50k_base": small}[name])
    monkeypatch.setitem(tokenizer.VOCAB_SIZE, "gpt2", 259)
    encode, decode, sizes = tokenizer.get_tokenizer("gpt2")
    assert decode([258, *encode("the thing")]) == "the thing"
    assert encode("the <|endoftext|>")[:2] == [257, 32] and 258 not in encode("<|endoftext|>")
    assert sizes.tolist() == [1] * 256 + [2, 3, 0]
    assert len(encode(" " * 800_000 + "x")) == 800_001
    with pytest.raises(SystemExit):                             # tiktoken's panic is no Exception
        encode("log " + " " * 1_100_000 + "x")
    assert "'log" in error_line(capsys.readouterr().err)


def test_a_download_out_of_reach_is_one_line(monkeypatch, capsys):
    import tiktoken
    def unreachable(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(SystemExit) as stop:
        tokenizer.get_tokenizer("gpt2")
    assert stop.value.code == 2 and "TIKTOKEN_CACHE_DIR" in capsys.readouterr().err


def test_the_order_of_batches_against_plain_loops():
    r = np.random.default_rng(0)
    documents = [np.append(256, r.integers(0, 256, n)).astype(np.uint16) for n in r.integers(1, 90, 50)]
    tokens, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]
    randperm = lambda n, seed: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, order = [], list(range(50))
    for epoch in (1, 2, 3):
        order = [order[i] for i in randperm(50, 7 * 1009 + epoch + 1000)]
        flat = [token for i in order for token in documents[i].tolist()]
        rows = [flat[i:i + 17] for i in range(0, len(flat) - 16, 17)]
        wanted += [rows[i] for i in randperm(len(rows), 7 * 1009 + epoch + 2000)][:len(rows) // 4 * 4]
    data = types.SimpleNamespace(train=tokens, doc_starts=starts, sequences_per_epoch=len(tokens) // 17 // 4 * 4)
    batches = loader.Batches(data, 16, seed=7)
    got = [row for n in (5, 1, 60, len(wanted) - 66) for row in batches.take(n).tolist()]      # steps straddle epochs
    assert got == wanted
    later = loader.Batches(data, 16, seed=7)
    for position in (len(wanted) - 9, 3, len(wanted) - 9):                                      # forward and back
        later.position = position
        assert later.take(9).tolist() == wanted[position:position + 9]


def test_the_document_of_every_target():
    starts, tokens = np.array([0, 3, 4, 11]), np.arange(17)
    owner = [max(d for d in range(4) if starts[d] <= i) for i in tokens]
    sequences = loader.cut(tokens, 4)                           # three of 5 tokens, the first of which is no target
    assert loader.documents_of(sequences, starts).tolist() == [owner[i] for row in sequences for i in row[1:]]


def test_scores_are_in_order_complete_and_unpadded():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
        def log_p(self, idx, targets):
            assert not self.training
            return -(targets + 1000 * idx).float()
    sequences = np.random.default_rng(1).integers(0, 257, (7, 5)).astype(np.uint16)
    model = Constant().train()
    for batch_size in (1, 3, 7, 100):
        got = loader.score(model, sequences, batch_size)
        assert got.dtype == np.float32
        assert got.tolist() == [-float(b) - 1000 * float(a) for row in sequences for a, b in zip(row[:-1], row[1:])]
    assert model.training


@pytest.mark.parametrize("content, overrides, names", [
    (None, dict(data="nowhere.txt"), ["nowhere.txt", "No such file"]),
    (b"", {}, ["empty"]),
    (b" \n\t\n", {}, ["empty"]),
    (b"a\0b", {}, ["binary"]),
    (b"\xff\xfe\xfa", {}, ["UTF-8"]),
    (b"too short\n", {}, ["too short", "val_tokens=1800", "are 10 in 1 documents"]),
    (b"x\n" * 9000, dict(train_tokens=1040, fitness_tokens=1000, val_tokens=100), ["train_tokens", "epoch_multiple"]),
    (b"x" * 9000, {}, ["0 documents", "shorter"]),                              # all of it is the validation set's
    (b"x" * 9000 + b"\n" + b"y" * 9000, {}, ["fitness set", "shorter"]),        # and here the fitness set's
])
def test_bad_text_is_refused_and_nothing_is_written(content, overrides, names, tmp_path, micro, capsys):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
        overrides = dict(data=tmp_path / "text.txt", **overrides)
    with pytest.raises(SystemExit) as stop:
        prepare.main(micro(**overrides))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(name in err for name in names), err
    assert not (tmp_path / "data").exists()


def test_bad_rows_folders_and_files_are_refused(tmp_path, micro, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    for data, names in (("rows.jsonl", ["row 2", "text"]), ("torn.jsonl", ["line 3"]), ("half.jsonl", ["surrogate"]), ("empty", ["empty"]), ("table.csv", [".txt"])):
        with pytest.raises(SystemExit) as stop:
            prepare.main(micro(data=tmp_path / data))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and all(name in err for name in names)


def test_other_data_in_data_dir_is_never_overwritten(tmp_path, micro, capsys):
    prepare.main(micro())
    before = (tmp_path / "data" / "manual_train.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        prepare.main(micro(train_tokens=2500))
    assert stop.value.code == 2 and "train_tokens" in capsys.readouterr().err
    assert (tmp_path / "data" / "manual_train.pt").read_bytes() == before
    for name, content in (("manual.json", b"{"), ("manual_bytes.safetensors", b"junk"), ("manual_bytes.safetensors", b"")):
        kept = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            prepare.main(micro())
        assert stop.value.code == 2 and name in capsys.readouterr().err
        (tmp_path / "data" / name).write_bytes(kept)
    for change in (lambda p: p.write_bytes(before[:500]), lambda p: p.write_bytes(b"junk"), lambda p: torch.save([1], p),
                   lambda p: p.unlink()):
        change(tmp_path / "data" / "manual_train.pt")
        with pytest.raises(SystemExit) as stop:
            loader.load(from_args(micro(), "")[0])
        assert stop.value.code == 2 and "manual_train.pt" in capsys.readouterr().err


def test_bits_per_byte_leaves_the_separator_out():
    from prior import mixture_losses
    p = np.log(np.array([0.5, 0.25, 0.125, 0.5], dtype=np.float32))
    sizes = np.array([1, 0, 3, 2], dtype=np.uint8)                          # the second target is a separator
    nats, [bits] = mixture_losses([(torch.tensor([0]), torch.ones(1, dtype=torch.float64))], [p], sizes, np.array([0, 1, 1, 1]))
    assert nats[0].tolist() == pytest.approx([math.log(2), 6 * math.log(2)]) and bits.item() == pytest.approx((1 + 3 + 1) / 6)


def test_public_files_without_ours_beside_them(micro, tmp_path, monkeypatch):
    """Token files of the public script come alone, named fineweb; the bytes of their tokens come from the tokenizer."""
    argv = micro()
    prepare.main(argv)
    for split in ("val", "train"):
        (tmp_path / "data" / f"manual_{split}.pt").rename(tmp_path / "data" / f"fineweb_{split}.pt")
    data = loader.load(from_args([*argv, "--data=fineweb"], "")[0])
    assert data.token_bytes.tolist() == [1] * 256 + [0]
    assert isinstance(prepare.main([*argv, "--data=fineweb"]), types.NoneType)
