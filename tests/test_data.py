"""
Preparation and loader against the rules written out in plain loops, and against the file format. The order of
an epoch and the fitness set: tests/test_parity.py, too.
"""
import hashlib
import json
import os
import re
import resource
import shutil
import types

import numpy as np
import pytest
import torch

import train
from data import loader, prepare, tokenizer
from infra.config import from_args
from infra.files import lock


def prepared(argv):
    """(config, (tokens, starts of the documents) of validation and of training) of these arguments."""
    prepare.main(argv)
    config = from_args(argv, "")[0]
    return config, [loader.read_tokens(config, split) for split in ("val", "train")]


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
    for link, target in dict(corpus="../b", again="LOUD.TXT", named="../blob", loop="../a", readme="README").items():
        (tmp_path / "a" / f"{link}.txt").symlink_to(target)
    os.mkfifo(tmp_path / "a" / "pipe.txt")                          # would be waited for
    with pytest.raises(SystemExit):                                 # too short, but read
        prepare.main(micro(data=f" {tmp_path / 'a'} , {tmp_path / 'b'},"))
    out = capsys.readouterr().out
    assert "left out 2 hidden, 1 without an ending, 1 .md, 1 .txt" in out and "empty.txt' is empty" in out, out
    text = "a/LOUD.TXT\0b/deep/far.txt\0b/near.txt\0blob\0a/README"         # in the order of their paths
    assert "5 documents" in out and hashlib.sha256(text.encode()).hexdigest() in out


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

@pytest.fixture
def documents(tmp_path, monkeypatch):
    """120 documents in two .parquet files with several row groups, in the place of the hub."""
    r = np.random.default_rng(0)
    texts = ["".join(map(chr, r.integers(97, 200, n))) for n in r.integers(0, 60, 120)]
    for name, part in (("a", texts[:70]), ("b", texts[70:])):
        write_parquet(tmp_path / name, row_group_size=20, id=[*map(str, range(len(part)))], text=part)
    monkeypatch.setattr(prepare, "FINEWEB", dict(
        path="parquet", data_files=[str(tmp_path / f"{n}.parquet") for n in "ab"], split="train"))
    return texts


def write_parquet(path, row_group_size=None, **columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), f"{path}.parquet", row_group_size=row_group_size)


def in_order(texts, budgets):
    """The rule, written out: fill one split, drop what is left of its last document, fill the next."""
    texts, splits = iter(texts), []
    for budget in budgets:
        tokens = []
        while len(tokens) < budget:
            tokens += [256, *next(texts).encode()]
        splits.append(tokens[:budget])
    return splits


def test_documents_fill_one_split_and_then_the_next(documents, micro, tmp_path, monkeypatch, capsys):
    """FineWeb's in file order, others, but the empty ones, shuffled; FineWeb's are then compared."""
    filled = [text for text in documents if text.strip()]
    shuffled = [filled[i] for i in np.random.default_rng(0).permutation(len(filled))]
    paths = f"{tmp_path}/a.parquet,{tmp_path}/b.parquet"
    for data, texts in (("fineweb", documents), (paths, shuffled)):
        for (tokens, starts), wanted in zip(prepared(micro(data=data))[1], in_order(texts, (1800, 3000))):
            assert tokens.tolist() == wanted
            assert starts.tolist() == [i for i, token in enumerate(wanted) if token == 256]
    out = capsys.readouterr().out
    assert f"{len(filled)} documents, of which {len(filled) - len(set(filled))} repeat another" in out
    assert out.count("not the published file") == 2
    before = files(tmp_path / "data")
    sha256 = {split: hashlib.sha256(before[f"fineweb_{split}.pt"]).hexdigest() for split in ("val", "train")}
    monkeypatch.setattr(prepare, "PUBLISHED", {"_val.pt": sha256["val"], "_train.pt": "0" * 64})
    prepare.main(micro(data="fineweb"))
    assert files(tmp_path / "data") == before
    val, train = capsys.readouterr().out.splitlines()[-2:]
    assert val.endswith(": the published file") and f"{sha256['train']}: not the published file" in train


@pytest.mark.parametrize("row", [0, 75])
def test_a_download_that_stops_leaves_nothing(row, documents, micro, tmp_path, monkeypatch, refused):
    import datasets
    load = datasets.load_dataset

    def torn(*args, **kwargs):
        def dies(of_row, i):
            if i == row:
                raise ConnectionError("no route to host")
            return of_row
        return load(*args, **kwargs).map(dies, with_indices=True)
    monkeypatch.setattr(datasets, "load_dataset", torn)
    line = refused(prepare.main, micro(data="fineweb"))
    assert "ConnectionError" in line and "fineweb_val.pt" in line and not (tmp_path / "data").exists()


@pytest.mark.parametrize("columns, words", [
    *((dict(text=column), ["row 1 has no text"]) for column in ([1, 2], [[1], [2]], [b"a", b"b"])),
    (dict(words=["a"]), ["'text'", "{'words': 'a'}"])])
def test_a_column_that_is_no_text(columns, words, tmp_path, micro, monkeypatch, refused):
    path = str(tmp_path / "x.parquet")
    write_parquet(tmp_path / "x", **columns)
    monkeypatch.setattr(prepare, "FINEWEB", dict(path="parquet", data_files=path, split="train"))
    for data in (path, "fineweb"):
        assert all(word in refused(prepare.main, micro(data=data)) for word in words)


def test_parquet_files_are_local_text(documents, tmp_path, micro, refused):
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a[1]*.parquet").write_bytes(whole)             # a name, not a pattern
    filled = [text for text in documents[:70] if text.strip()]
    assert prepare.file_documents(tmp_path / "a[1]*.parquet") == filled
    write_parquet(tmp_path / "gaps", text=["one", None, " ", "two"])
    assert prepare.file_documents(tmp_path / "gaps.parquet") == ["one", "two"]
    (tmp_path / "page.parquet").write_bytes(whole[:1500] + bytes(200) + whole[1700:])
    write_parquet(tmp_path / "none", words=np.array([], str))
    for name, words in (("page", ""), ("none", "empty")):
        line = refused(prepare.main, micro(data=tmp_path / f"{name}.parquet"))
        assert words in line and f"{name}.parquet" in line


def test_the_fitness_set_is_whole_documents_cut_to_its_sequences(ready):
    starts = loader.read_tokens(from_args(ready(), "")[0], "train")[1]
    for wanted in (700, 1000, 1400, int(starts[starts > 700][0])):         # the last one ends with a document
        config, splits = prepared(ready(fitness_tokens=wanted))
        data, (tokens, starts) = loader.load(config), splits[1]
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
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    assert tokenizer.RANKS_NAME == hashlib.sha1(url.encode()).hexdigest()       # its name in tiktoken's cache
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


class Code:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def saved(change):
    """What torch.load() finds in a file becomes change(of it)."""
    return lambda path: torch.save(change(torch.load(path)), path)


JSON, BYTES, TRAIN = "manual.json", "manual_bytes.safetensors", "manual_train.pt"
NO_TOKENS, OTHERS = "_train.pt' is not a readable token file", "are not what data.prepare wrote"


@pytest.mark.parametrize("damage", [
    (JSON, lambda path: path.unlink(), "_train.pt"),                    # it says that the others are ours
    *((name, lambda path, junk=junk: path.write_bytes(junk), words)
      for name, words in ((JSON, JSON), (BYTES, BYTES), (TRAIN, NO_TOKENS)) for junk in (b"", b"{junk")),
    (TRAIN, lambda path: path.write_bytes(path.read_bytes()[:500]), NO_TOKENS),
    (TRAIN, saved(lambda file: [1]), "TypeError: list indices"),
    *((TRAIN, saved(lambda file, starts=starts: {**file, "doc_starts": starts}), NO_TOKENS) for starts in (
        Code(), torch.zeros(1).expand(10 ** 12), torch.zeros(4).to_sparse())),
    # no line says to train on so many, nor on another tokenizer's
    *((TRAIN, saved(lambda file, of=of: {**file, "tokens": of(file["tokens"])}), OTHERS) for of in (
        lambda tokens: tokens.repeat(2), lambda tokens: tokens.fill_(300))),
])
def test_other_data_is_never_used_nor_overwritten(damage, tmp_path, ready, refused, monkeypatch):
    name, change, words = damage
    monkeypatch.chdir(tmp_path)
    change(tmp_path / "data" / name)
    before = files(tmp_path / "data")
    for script in (prepare, train) if name == TRAIN else (prepare,):
        assert words in refused(script.main, ready())
    assert files(tmp_path / "data") == before and not (tmp_path / "was_run").exists()


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
    prepare.main(micro(data=f" {text} ,"))
    assert "text.txt' is gone" in capsys.readouterr().out
    assert "typo.txt" in refused(prepare.main, micro(data=tmp_path / "typo.txt"))
    assert "val_tokens is 1800 there" in refused(prepare.main, micro(data=text, val_tokens=900))


def test_public_files_without_ours_beside_them(ready, tmp_path, monkeypatch, refused):
    """The public script's files come alone, named fineweb; their tokens' bytes come from the tokenizer."""
    for split in ("val", "train"):
        (tmp_path / "data" / f"manual_{split}.pt").rename(tmp_path / "data" / f"fineweb_{split}.pt")
    monkeypatch.setattr(prepare, "write", None)                     # would be called
    prepare.main(ready(data="fineweb"))
    data = loader.load(from_args(ready(data="fineweb"), "")[0])
    assert data.token_bytes.tolist() == [1] * 256 + [0]
    (tmp_path / "data" / "fineweb_val.pt").unlink()                 # half of them
    assert "_train.pt" in refused(prepare.main, ready(data="fineweb"))


# ---------------------------------------------------------------------------------------------- the loader

def test_batches_go_on_from_any_position():
    r, n = np.random.default_rng(0), 40                             # sequences of an epoch
    tokens, starts = r.integers(0, 256, 720).astype(np.uint16), np.arange(0, 720, 30)
    data = types.SimpleNamespace(train=tokens, doc_starts=starts, sequences_per_epoch=n)
    whole = loader.Batches(data, 16, seed=7).take(3 * n).tolist()
    batches, taken = loader.Batches(data, 16, seed=7), []
    for steps in (5, 1, 60, 54):                                    # they straddle epochs
        taken += batches.take(steps).tolist()
    assert taken == whole and whole[:n] != whole[n:2 * n]
    for position in (3 * n - 9, 3, 2 * n - 4):                      # forward and back
        batches.position = position
        assert batches.take(9).tolist() == whole[position:position + 9]


def test_the_document_of_every_target():
    starts, tokens = np.array([0, 3, 4, 11]), np.arange(17)
    owner = [max(d for d in range(4) if starts[d] <= i) for i in tokens]
    sequences = loader.cut(tokens, 4)                   # three of 5 tokens, the first of which is no target
    assert loader.documents_of(sequences, starts).tolist() == [owner[i] for row in sequences for i in row[1:]]
