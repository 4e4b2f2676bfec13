"""FineWeb's stream, on local .parquet files, against plain loops over the same documents; what stops it; tiktoken's ranks."""
import hashlib
import json

import numpy as np
import pytest

from infra.config import from_args
from data import loader, prepare, tokenizer
from tests.conftest import error_line

pa = pytest.importorskip("pyarrow")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """120 documents in two .parquet files with several row groups, in the place of the hub."""
    import pyarrow.parquet
    r = np.random.default_rng(0)
    texts = ["".join(map(chr, r.integers(97, 200, n))) for n in r.integers(0, 60, 120)]
    for name, part in (("a", texts[:70]), ("b", texts[70:])):
        pa.parquet.write_table(pa.table({"id": [str(i) for i in range(len(part))], "text": part}),
                               tmp_path / f"{name}.parquet", row_group_size=20)
    monkeypatch.setattr(prepare, "FINEWEB", dict(
        path="parquet", data_files=[str(tmp_path / f"{n}.parquet") for n in "ab"], split="train"))
    return texts


def in_order(texts, val_tokens, train_tokens):
    """The rule, written out: fill one split, drop what is left of its last document, fill the next."""
    splits, budgets = [[]], [val_tokens, train_tokens]
    for text in texts:
        splits[-1] += ([256] + list(text.encode()))[:budgets[len(splits) - 1] - len(splits[-1])]
        if len(splits[-1]) == budgets[len(splits) - 1]:
            splits.append([])
        if len(splits) == 3:
            return splits[:2]


def bad(argv, capsys, call=prepare.main):
    with pytest.raises(SystemExit) as stop:
        call(argv)
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_the_stream_in_file_order(documents, micro, tmp_path, capsys):
    argv = micro(data="fineweb")
    prepare.main(argv)
    for split, wanted in zip(("val", "train"), in_order(documents, 1800, 3000)):
        tokens, starts = loader.read_tokens(from_args(argv, "")[0], split)
        assert tokens.tolist() == wanted and starts.tolist() == [i for i, token in enumerate(wanted) if token == 256]
    assert set(files(tmp_path / "data")) == {"fineweb_val.pt", "fineweb_train.pt", "fineweb_bytes.safetensors", "fineweb.json"}
    before = files(tmp_path / "data")
    prepare.main(argv)
    assert files(tmp_path / "data") == before


def test_the_files_are_compared_with_the_published_ones(documents, micro, tmp_path, monkeypatch, capsys):
    argv = micro(data="fineweb")
    prepare.main(argv)
    assert capsys.readouterr().out.count("not the published file") == 2
    of = {split: hashlib.sha256((tmp_path / "data" / f"fineweb_{split}.pt").read_bytes()).hexdigest() for split in ("val", "train")}
    monkeypatch.setattr(prepare, "PUBLISHED", {"_val.pt": of["val"], "_train.pt": "0" * 64})
    prepare.main(argv)
    _, val, train = capsys.readouterr().out.splitlines()
    assert "the published file" in val and "not" not in val and "not the published file" in train and of["train"] in train


def test_a_hub_out_of_reach(documents, micro, tmp_path, monkeypatch, capsys):
    import datasets
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(prepare, "FINEWEB", dict(path="HuggingFaceFW/fineweb", split="train"))
    err = bad(micro(data="fineweb"), capsys)
    assert "HuggingFaceFW/fineweb" in err and "fineweb_val.pt" in err and not (tmp_path / "data").exists()


def test_what_is_pinned():
    assert prepare.FINEWEB == dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
                                  revision="9bb295ddab0e05d785b879661af7260fed5140fc")
    assert prepare.PUBLISHED == {"_val.pt": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
                                 "_train.pt": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf"}
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"         # tiktoken's name for it in its cache
    assert tokenizer.RANKS_NAME == hashlib.sha1(url.encode()).hexdigest()


def test_a_folder_that_is_none(documents, micro, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        assert str(folder) in bad(micro(data="fineweb", data_dir=folder), capsys)


def test_a_download_that_stops_leaves_nothing(documents, micro, tmp_path, monkeypatch, capsys):
    import datasets
    load = datasets.load_dataset
    def torn(*args, **kwargs):
        stream = load(*args, **kwargs)
        def dies(row, i):
            if i == 75:
                raise ConnectionError("no route to host")
            return row
        return stream.map(dies, with_indices=True)
    monkeypatch.setattr(datasets, "load_dataset", torn)
    assert "ConnectionError" in bad(micro(data="fineweb"), capsys)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()


def test_what_fineweb_refuses(documents, micro, tmp_path, capsys):
    assert "too short" in bad(micro(data="fineweb", train_tokens=30_000), capsys) and not (tmp_path / "data").exists()
    prepare.main(micro(data="fineweb", data_dir=tmp_path / "half"))
    whole = files(tmp_path / "half")
    (tmp_path / "half" / "fineweb_val.pt").unlink()             # what is lost of ours is written again
    prepare.main(micro(data="fineweb", data_dir=tmp_path / "half"))
    assert files(tmp_path / "half") == whole
    for name in ("_val.pt", ".json"):                           # half of the public script's
        (tmp_path / "half" / f"fineweb{name}").unlink()
    kept = files(tmp_path / "half")
    assert ("_train.pt" in bad(micro(data="fineweb", data_dir=tmp_path / "half"), capsys)
            and files(tmp_path / "half") == kept)


@pytest.mark.parametrize("column", [[1, 2], [[1], [2]], [b"a", b"b"]])
def test_a_column_that_is_no_text(column, documents, tmp_path, micro, monkeypatch, capsys):
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert "row 1" in (err := bad(micro(data=tmp_path / "x.parquet"), capsys)) and "no text" in err
    monkeypatch.setattr(prepare, "FINEWEB", dict(path="parquet", data_files=str(tmp_path / "x.parquet"), split="train"))
    assert "row 1" in bad(micro(data="fineweb"), capsys)


def test_parquet_files_are_local_text(documents, tmp_path, micro, capsys):
    (tmp_path / "a[1]*.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())         # a name, not a pattern
    for name in ("a", "a[1]*"):
        assert prepare.file_documents(tmp_path / f"{name}.parquet") == [text for text in documents[:70] if text.strip()]
    pa.parquet.write_table(pa.table({"text": ["one", None, " ", "two"]}), tmp_path / "gaps.parquet")
    assert prepare.file_documents(tmp_path / "gaps.parquet") == ["one", "two"]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "page.parquet").write_bytes(whole[:1500] + bytes(200) + whole[1700:])
    pa.parquet.write_table(pa.table({"words": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:3000])
    pa.parquet.write_table(pa.table({"words": ["a"]}), tmp_path / "words.parquet")
    for name, names in (("torn", ["torn.parquet"]), ("page", ["page.parquet"]), ("none", ["none.parquet", "empty"]),
                        ("words", ["words.parquet", "'text'", "{'words': 'a'}"])):
        err = bad(micro(data=tmp_path / f"{name}.parquet"), capsys)
        assert all(n in err for n in names), err


