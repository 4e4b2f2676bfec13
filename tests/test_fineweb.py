"""FineWeb's stream, on local .parquet files, against plain loops over the same documents; what stops it."""
import hashlib

import numpy as np
import pytest

from data import loader, prepare, tokenizer
from infra.config import from_args
from tests.test_data import files

pa = pytest.importorskip("pyarrow")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """120 documents in two .parquet files with several row groups, in the place of the hub."""
    import pyarrow.parquet          # noqa: F401 - and with it pyarrow
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


def test_the_stream_in_file_order(documents, micro, tmp_path, monkeypatch, capsys):
    """And its files are compared with the published ones."""
    argv = micro(data="fineweb")
    prepare.main(argv)
    assert capsys.readouterr().out.count("not the published file") == 2
    for split, wanted in zip(("val", "train"), in_order(documents, 1800, 3000)):
        tokens, starts = loader.read_tokens(from_args(argv, "")[0], split)
        assert tokens.tolist() == wanted
        assert starts.tolist() == [i for i, token in enumerate(wanted) if token == 256]
    before = files(tmp_path / "data")
    sha256 = {split: hashlib.sha256(before[f"fineweb_{split}.pt"]).hexdigest() for split in ("val", "train")}
    monkeypatch.setattr(prepare, "PUBLISHED", {"_val.pt": sha256["val"], "_train.pt": "0" * 64})
    prepare.main(argv)
    assert files(tmp_path / "data") == before
    val, train = capsys.readouterr().out.splitlines()[-2:]
    assert val.endswith(": the published file") and f"{sha256['train']}: not the published file" in train


def test_what_is_pinned():
    assert prepare.FINEWEB == dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
                                  revision="9bb295ddab0e05d785b879661af7260fed5140fc")
    assert prepare.PUBLISHED == {
        "_val.pt": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
        "_train.pt": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf"}
    # tiktoken's name for it in its cache
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    assert tokenizer.RANKS_NAME == hashlib.sha1(url.encode()).hexdigest()


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


def test_what_fineweb_refuses(documents, micro, tmp_path, refused):
    assert "too short" in refused(prepare.main, micro(data="fineweb", train_tokens=30_000))
    assert not (tmp_path / "data").exists()
    prepare.main(micro(data="fineweb"))
    for name in ("_val.pt", ".json"):                           # half of the public script's
        (tmp_path / "data" / f"fineweb{name}").unlink()
    kept = files(tmp_path / "data")
    assert "_train.pt" in refused(prepare.main, micro(data="fineweb")) and files(tmp_path / "data") == kept


@pytest.mark.parametrize("column", [[1, 2], [[1], [2]], [b"a", b"b"]])
def test_a_column_that_is_no_text(column, documents, tmp_path, micro, monkeypatch, refused):
    path = str(tmp_path / "x.parquet")
    pa.parquet.write_table(pa.table({"text": column}), path)
    monkeypatch.setattr(prepare, "FINEWEB", dict(path="parquet", data_files=path, split="train"))
    for data in (path, "fineweb"):
        assert "row 1 has no text" in refused(prepare.main, micro(data=data))


def test_parquet_files_are_local_text(documents, tmp_path, micro, refused):
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a[1]*.parquet").write_bytes(whole)             # a name, not a pattern
    for name in ("a.parquet", "a[1]*.parquet"):
        assert prepare.file_documents(tmp_path / name) == [text for text in documents[:70] if text.strip()]
    (tmp_path / "page.parquet").write_bytes(whole[:1500] + bytes(200) + whole[1700:])
    (tmp_path / "torn.parquet").write_bytes(whole[:3000])
    for name, table in dict(gaps={"text": ["one", None, " ", "two"]}, words={"words": ["a"]},
                            none={"words": pa.array([], pa.string())}).items():
        pa.parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    assert prepare.file_documents(tmp_path / "gaps.parquet") == ["one", "two"]
    for name, words in dict(torn=[], page=[], none=["empty"], words=["'text'", "{'words': 'a'}"]).items():
        line = refused(prepare.main, micro(data=tmp_path / f"{name}.parquet"))
        assert all(word in line for word in [f"{name}.parquet", *words]), line
