"""Preparation and loader against the rules written out again in plain loops, and against the file format."""
import hashlib
import json
import re
import resource
import shutil
import types

import numpy as np
import pytest
import torch

from data import loader, prepare, tokenizer
from infra.config import from_args
from infra.files import lock


def prepared(argv):
    """(config, {split: (tokens, starts of the documents)}) of these arguments."""
    prepare.main(argv)
    config = from_args(argv, "")[0]
    return config, {split: loader.read_tokens(config, split) for split in ("val", "train")}


def separate(tokens, starts):
    """Documents as texts, from a token file of the byte tokenizer."""
    return [bytes(d[d < 256].astype(np.uint8)).decode(errors="replace") for d in np.split(tokens, starts[1:])]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# ---------------------------------------------------------------------------------------- text to documents

def test_no_paragraph_of_the_manual_stands_in_two_documents():
    texts = prepare.source_documents([prepare.Path(prepare.MANUAL)])
    documents = [" ".join(d.split()) for d in texts]
    everything = "\n".join(documents)
    paragraphs = [" ".join(p.split()) for d in texts for p in d.split("\n\n")]
    assert len(documents) > 200 and [p for p in paragraphs if len(p) >= 40 and everything.count(p) > 1] == []
    assert 500 < sum(map(len, documents)) / len(documents) < 1500


@pytest.mark.parametrize("name, content, documents", [
    ("lines.txt", "one\ntwo\n", ["one", "two"]),
    ("blank.txt", "one\nmore\n \t\ntwo\n\n\n\nthree\n", ["one\nmore", "two", "three\n"]),
    ("crlf.txt", "one\r\n\r\ntwo", ["one", "two"]),
    ("cr.txt", "one\r\rtwo", ["one", "two"]),
    ("rows.jsonl", '{"text": "a\\nb", "id": 1}\n\n{"text": "c"}\n', ["a\nb", "c"]),
    ("gaps.jsonl", '{"text": null}\n{"text": " "}\n{"text": "a"}\n', ["a"]),        # null as in .parquet
])
def test_documents_of_local_files(name, content, documents, tmp_path):
    (tmp_path / name).write_text(content)
    assert prepare.file_documents(tmp_path / name) == documents


def test_which_files_of_a_folder_are_read(tmp_path, micro, capsys):
    """Each real file once, through links to files and folders, too; all else is counted and said."""
    for name in ("a/LOUD.TXT", "a/notes.md", "a/README", "a/.hidden.txt", "a/.git/git.txt", "a/empty.txt",
                 "b/deep/far.txt", "b/near.txt", "blob"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    for link, target in dict(corpus="../b", again="LOUD.TXT", named="../blob", loop="../a").items():
        (tmp_path / "a" / f"{link}.txt").symlink_to(target)
    with pytest.raises(SystemExit):                                 # too short, but read
        prepare.main(micro(data=f" {tmp_path / 'a'} , {tmp_path / 'b'},"))
    out = capsys.readouterr().out
    assert "left out 2 hidden, 1 without an ending, 1 .md" in out and "empty.txt' is empty" in out, out
    text = "a/LOUD.TXT\0b/deep/far.txt\0b/near.txt\0blob"          # in the order of their paths
    assert "4 documents" in out and hashlib.sha256(text.encode()).hexdigest() in out


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, micro, monkeypatch, refused):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(prepare.Path, "iterdir", closed)
    assert f"'{tmp_path}': Permission denied" in refused(prepare.main, micro(data=tmp_path))


@pytest.mark.parametrize("file, overrides, words", [       # further ones: tests/test_bad_input.py
    (("blank.txt", b" \n\t\n"), {}, ["empty"]),
    (("short.txt", b"too short\n"), {}, ["val_tokens=1800", "are 10 in 1 documents"]),
    (("small.txt", b"x\n" * 9000), dict(train_tokens=1040, fitness_tokens=1000, val_tokens=100),
     ["train_tokens", "epoch_multiple"]),
    # all of it is the validation set's, or the fitness set's
    (("one.txt", b"x" * 9000), {}, ["0 documents", "shorter"]),
    (("two.txt", b"x" * 9000 + b"\n" + b"y" * 9000), {}, ["fitness set", "shorter"]),
    (("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}\n'), {}, ["row 2", "text"]),
    (("torn.jsonl", b'{"text": "a"}\n\n{"text": \n'), {}, ["line 3"]),
    (("half.jsonl", b'{"text": "a\\ud800"}\n'), {}, ["surrogate"]),
])
def test_bad_text_is_refused_and_leaves_nothing(file, overrides, words, tmp_path, micro, refused):
    name, content = file
    (tmp_path / name).write_bytes(content)
    line = refused(prepare.main, micro(data=tmp_path / name, **overrides))
    assert all(word in line for word in words), line
    assert [p.name for p in tmp_path.iterdir()] == [name]


# -------------------------------------------------------------------------------------- documents to tokens

def test_local_text_becomes_the_tokens_it_is(tmp_path, micro, capsys):
    texts = [f"document {i}: " + "xyzü" * i for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = micro(data=tmp_path / "text.txt", train_tokens=4000, val_tokens=1000)
    val, train = (separate(*split) for split in prepared(argv)[1].values())
    assert "which 0 repeat another" in capsys.readouterr().out
    assert all(d in texts for d in [*val[:-1], *train[:-1]]) and any(d.startswith(val[-1]) for d in texts)
    assert not set(val) & set(train[:-1]) and len(val) > 5
    assert val[:-1] != texts[:len(val) - 1]                         # shuffled
    prepare.main([*argv, f"--data_dir={tmp_path / 'again'}"])       # by a fixed seed
    assert files(tmp_path / "again")["text_train.pt"] == files(tmp_path / "data")["text_train.pt"]


def test_the_fitness_set_is_whole_documents_cut_to_its_sequences(ready):
    starts = loader.read_tokens(from_args(ready(), "")[0], "train")[1]
    for wanted in (700, 1000, 1400, int(starts[starts > 700][0])):         # the last one ends with a document
        config, splits = prepared(ready(fitness_tokens=wanted))
        data, (tokens, starts) = loader.load(config), splits["train"]
        end = min(s for s in [*starts.tolist(), len(tokens)] if s >= wanted)
        assert data.fit.ravel().tolist() == tokens[:wanted // 33 * 33].tolist()
        assert data.train.tolist() == tokens[end:].tolist() and tokens[end] == 256


def test_the_file_format(micro, tmp_path, monkeypatch):
    (tmp_path / "q0, a copy").mkdir()                   # of a clone whose path has a comma
    monkeypatch.setattr(prepare, "MANUAL", shutil.copy(prepare.MANUAL, tmp_path / "q0, a copy"))
    config, _ = prepared(micro())
    assert set(files(tmp_path / "data")) == {
        "manual_val.pt", "manual_train.pt", "manual_bytes.safetensors", "manual.json"}
    for split, seed in (("val", 42), ("train", 43)):
        path = tmp_path / "data" / f"manual_{split}.pt"
        file = torch.load(path, weights_only=True)
        assert list(file) == ["tokens", "doc_starts", "bos_id", "seq_shuffle_seed", "seq_size"]
        assert file["tokens"].dtype == torch.uint16 and file["doc_starts"].dtype == torch.int64
        assert (file["bos_id"], file["seq_shuffle_seed"], file["seq_size"]) == (256, seed, 33)
        torch.save(file, tmp_path / path.name)          # the published SHA-256 are of such files
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert len(file["tokens"]) == getattr(config, f"{split}_tokens")
        starts = file["tokens"].numpy() == 256
        assert starts.nonzero()[0].tolist() == file["doc_starts"].tolist()
    about = json.loads((tmp_path / "data" / "manual.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", about["text_sha256"]) and about["tokenizer"] == "bytes"


def test_the_gpt2_tokenizer(monkeypatch, refused):
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    small = tiktoken.Encoding("r50k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"r50k_base": small}[name])
    monkeypatch.setitem(tokenizer.VOCAB_SIZE, "gpt2", 259)
    encode, decode, sizes = tokenizer.get_tokenizer("gpt2")
    assert decode([258, *encode("the thing")]) == "the thing"
    assert encode("the <|endoftext|>")[:2] == [257, 32] and 258 not in encode("<|endoftext|>")
    assert sizes.tolist() == [1] * 256 + [2, 3, 0]
    assert len(encode(" " * 800_000 + "x")) == 800_001
    assert "'log" in refused(encode, "log " + " " * 1_100_000 + "x")        # tiktoken's panic is no Exception

    def unreachable(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert "TIKTOKEN_CACHE_DIR" in refused(tokenizer.get_tokenizer, "gpt2")


# ---------------------------------------------------------------------------------- what stands in data_dir

def test_a_disk_that_is_full(tmp_path, micro, refused, monkeypatch):
    """As far as a process's limit goes: one line, what was there stays, and the same command goes on."""
    order = ["manual.json", "manual_val.pt", "manual_train.pt", "manual_bytes.safetensors"]
    for limit, written in ((100, 0), (5000, 1), (7000, 2)):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            line = refused(prepare.main, micro())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert f"{order[written]}': could not be written" in line
        assert set(files(tmp_path / "data")) == set(order[:written])
    prepare.main(micro())
    whole = files(tmp_path / "data")
    (tmp_path / "data" / "manual_train.pt").unlink()                # what is lost is written again
    prepare.main(micro())
    assert files(tmp_path / "data") == whole and set(whole) == set(order)
    monkeypatch.setattr(prepare, "write", None)                     # and what is there is not
    prepare.main(micro())


def with_tokens(change):
    def rewrite(path):
        file = torch.load(path)
        torch.save({**file, "tokens": change(file["tokens"])}, path)
    return rewrite


@pytest.mark.parametrize("name, change, words", [
    ("manual.json", lambda path: path.unlink(), "_train.pt"),           # it says that the others are ours
    ("manual.json", lambda path: path.write_bytes(b"{"), "manual.json"),
    ("manual_bytes.safetensors", lambda path: path.write_bytes(b"junk"), "manual_bytes.safetensors"),
    ("manual_bytes.safetensors", lambda path: path.write_bytes(b""), "manual_bytes.safetensors"),
    ("manual_train.pt", lambda path: path.write_bytes(b"junk"), "manual_train.pt"),
    ("manual_train.pt", lambda path: path.write_bytes(path.read_bytes()[:500]), "manual_train.pt"),
    ("manual_train.pt", lambda path: torch.save([1], path), "TypeError: list indices"),
    # no line says to train on so many, nor on another tokenizer's
    ("manual_train.pt", with_tokens(lambda tokens: tokens.repeat(2)), "not what data.prepare wrote"),
    ("manual_train.pt", with_tokens(lambda tokens: tokens.fill_(300)), "not what data.prepare wrote"),
])
def test_other_data_is_never_overwritten(name, change, words, tmp_path, ready, refused):
    change(tmp_path / "data" / name)
    before = files(tmp_path / "data")
    assert words in refused(prepare.main, ready())
    assert files(tmp_path / "data") == before


@pytest.mark.parametrize("train_tokens", [3000, 2500])
def test_two_preparations_at_once(train_tokens, tmp_path, micro, monkeypatch, refused):
    """Of two on one data_dir the first that is whole stays; the other takes it, or is told what differs."""
    tokenize, write, whole, written = prepare.tokenize, prepare.write, {}, []

    def other_is_faster(config, documents):
        monkeypatch.setattr(prepare, "tokenize", tokenize)
        prepare.main(micro())
        whole.update(files(tmp_path / "data"))
        return tokenize(config, documents)

    def alone(*args):
        written.append(refused(lock, tmp_path / "data" / ".lock", ""))
        write(*args)
    monkeypatch.setattr(prepare, "tokenize", other_is_faster)
    monkeypatch.setattr(prepare, "write", alone)
    if train_tokens == 3000:
        prepare.main(micro())
    else:
        line = refused(prepare.main, micro(train_tokens=train_tokens))
        assert "train_tokens is 3000 there and 2500 here" in line
    assert len(written) == 1 and whole == files(tmp_path / "data")


def test_tokens_stand_where_their_text_is_gone(tmp_path, micro, refused, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of the text" for i in range(400)))
    prepare.main(micro(data=text))
    text.unlink()
    prepare.main(micro(data=text))
    assert "text.txt' is gone" in capsys.readouterr().out
    assert "typo.txt" in refused(prepare.main, micro(data=tmp_path / "typo.txt"))
    assert "val_tokens is 1800 there" in refused(prepare.main, micro(data=text, val_tokens=900))


def test_public_files_without_ours_beside_them(ready, tmp_path, monkeypatch):
    """The public script's files come alone, named fineweb; their tokens' bytes come from the tokenizer."""
    for split in ("val", "train"):
        (tmp_path / "data" / f"manual_{split}.pt").rename(tmp_path / "data" / f"fineweb_{split}.pt")
    monkeypatch.setattr(prepare, "write", None)                     # would be called
    prepare.main(ready(data="fineweb"))
    data = loader.load(from_args(ready(data="fineweb"), "")[0])
    assert data.token_bytes.tolist() == [1] * 256 + [0]


# ---------------------------------------------------------------------------------------------- the loader

def test_the_order_of_batches_against_plain_loops():
    r = np.random.default_rng(0)
    documents = [np.append(256, r.integers(0, 256, n)).astype(np.uint16) for n in r.integers(1, 90, 50)]
    tokens, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]

    def randperm(n, seed):
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, order = [], list(range(50))
    for epoch in (1, 2, 3):
        order = [order[i] for i in randperm(50, 7 * 1009 + epoch + 1000)]
        flat = [token for i in order for token in documents[i].tolist()]
        rows = [flat[i:i + 17] for i in range(0, len(flat) - 16, 17)]
        wanted += [rows[i] for i in randperm(len(rows), 7 * 1009 + epoch + 2000)][:len(rows) // 4 * 4]
    per_epoch = len(tokens) // 17 // 4 * 4
    data = types.SimpleNamespace(train=tokens, doc_starts=starts, sequences_per_epoch=per_epoch)
    batches = loader.Batches(data, 16, seed=7)
    steps = (5, 1, 60, len(wanted) - 66)                                            # they straddle epochs
    assert [row for n in steps for row in batches.take(n).tolist()] == wanted
    later = loader.Batches(data, 16, seed=7)
    for position in (len(wanted) - 9, 3, len(wanted) - 9):                          # forward and back
        later.position = position
        assert later.take(9).tolist() == wanted[position:position + 9]


def test_the_document_of_every_target():
    starts, tokens = np.array([0, 3, 4, 11]), np.arange(17)
    owner = [max(d for d in range(4) if starts[d] <= i) for i in tokens]
    sequences = loader.cut(tokens, 4)                   # three of 5 tokens, the first of which is no target
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
        assert got.tolist() == [-b - 1000 * a for row in sequences.tolist() for a, b in zip(row, row[1:])]
    assert model.training
