"""
Text -> token files. One process: python -m data.prepare CONFIG [--name=value ...]
Reads the Python manual (data=manual: manual.jsonl beside this file), local .txt, .jsonl and .parquet files, or FineWeb
(data=fineweb), splits whole documents into validation and training (the fitness set is the front of the training file),
and writes into data_dir:
  NAME_val.pt, NAME_train.pt   tokens (uint16), doc_starts (int64), bos_id, seq_shuffle_seed, seq_size
  NAME_bytes.npy               UTF-8 bytes of every token, 0 for the separator
  NAME.json                    what was read: source, SHA-256 of the text, sizes; written last, it says "whole"
NAME is manual, text or fineweb. The format is the public Slowrun script's: its files and ours are interchangeable.
"""
import glob
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from config import from_args
from data.loader import epoch_of, file_name, fingerprint, load, split_fitness, text_source
from data.tokenizer import get_tokenizer
from errors import refuse
from files import differences
from population import Run
from world import progress_bar

SHUFFLE_SEED = 0        # of the documents, before the split (FineWeb's stay in file order, as the public script takes them)
ENDINGS = ("_val.pt", "_train.pt", "_bytes.npy", ".json")
KINDS = (".txt", ".jsonl", ".parquet")
MANUAL = Path(__file__).with_name("manual.jsonl")
FINEWEB = dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
               revision="9bb295ddab0e05d785b879661af7260fed5140fc")          # v1.4.0
PUBLISHED = {                       # (split, tokens) -> SHA-256 of the file that the public script wrote, with torch 2.10
    ("val", 10_000_000): "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    ("train", 100_000_000): "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}


# ------------------------------------------------------------------------------------------ text to documents

def streamed(**source):
    """
    The column text of a data set of the hub, or of .parquet files, row by row as it comes; "" for none.
    Exits with code 2 where it cannot be read, at once or on the way.
    """
    import datasets                         # slow, and needed here alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)         # retries for half a minute
    name = source.get("data_files") or source["path"]
    try:
        stream = datasets.load_dataset(**source, streaming=True, batch_size=100)       # rows read ahead are most of the memory
        columns = stream.column_names or list(next(iter(stream.take(1)), {}))
        if "text" not in columns:
            refuse(f"data: {name} has no column 'text', only {', '.join(columns) or 'nothing'}; "
                   "rename the one with the documents")
        for number, row in enumerate(stream.select_columns(["text"])):
            if not isinstance(row["text"], str | None):
                refuse(f"data: {name}, row {number}: its column 'text' holds a {type(row['text']).__name__}, "
                       "not a text; convert the column")
            yield row["text"] or ""
    except Exception as e:                  # anything, from a lost network to a torn file
        mend = ("is it a whole .parquet file?" if source["path"] == "parquet" else
                "nothing was written; connect and run this again, or put the public fineweb_val.pt and fineweb_train.pt into data_dir")
        refuse(f"data: cannot read {name} ({type(e).__name__}): {mend}")


def read_text(path):
    """A file's text, not only white space. Exits with code 2 where it is none."""
    try:
        text = path.read_text("utf-8-sig")                      # any line ending becomes \n
    except OSError as e:
        refuse(f"data: cannot read {path}: {e.strerror}; name .txt, .jsonl or .parquet files, or folders of them")
    except UnicodeDecodeError as e:
        refuse(f"data: {path} is not UTF-8 text (byte {e.start}); convert it, or leave it out")
    if "\0" in text:
        refuse(f"data: {path} is binary, not text; leave it out")
    if not text.strip():
        refuse(f"data: {path} is empty; leave it out")
    return text


def row_text(path, number, line):
    """The document in a line of a .jsonl file."""
    try:
        text = json.loads(line)["text"]
        text.encode()                       # a lone surrogate is no text
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        refuse(f"data: {path} line {number} is no JSON object with a text in its column 'text'; mend or remove the line")


def file_documents(path):
    """
    Documents of a .txt file (separated by white-space-only lines; without any, one a line),
    a .jsonl or a .parquet (column text).
    """
    if path.suffix == ".parquet":
        documents = streamed(path="parquet", data_files=glob.escape(str(path)), split="train")
    elif path.suffix == ".jsonl":
        documents = [row_text(path, number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    else:
        text = read_text(path)
        blank = re.search(r"\n[^\S\n]*\n", text.strip())
        documents = re.split(r"\n(?:[^\S\n]*\n)+", text) if blank else text.split("\n")
    return [document for document in documents if document.strip()]


def source_documents(source):
    """
    The documents of data=manual, or of files and folders separated by commas, each file once.
    Exits with code 2 where there are none.
    """
    if source == "manual":
        return file_documents(MANUAL)
    files = []
    for path in map(Path, filter(None, source.split(","))):
        found = [p for p in path.rglob("*") if p.is_file() or not p.exists()] if path.is_dir() else [path]
        inside = sorted(p for p in found if p.suffix in KINDS)
        if not path.exists():
            refuse(f"data: {path} does not exist; name .txt, .jsonl or .parquet files, or folders of them, separated by commas")
        if not inside:
            refuse(f"data: {path} is no .txt, .jsonl or .parquet file, nor a folder of them")
        if len(inside) < len(found):
            kinds = ", ".join(sorted({p.suffix for p in found} - {*KINDS, ""})[:9]) or "no ending"
            print(f"data: {path}: {len(found) - len(inside)} files left out, of other kinds ({kinds})")
        files += inside
    if not files:
        refuse(f"data={source!r} names no file: name .txt, .jsonl or .parquet files, or folders of them, separated by commas")
    return [document for path in {os.path.abspath(p): p for p in files}.values() for document in file_documents(path)]


# ---------------------------------------------------------------------------------------- documents to tokens

def take(documents, budget):
    """(tokens uint16 of the first `budget` tokens, doc_starts int64) from an iterator of documents; the last is cut."""
    parts, starts, n = [], [], 0
    for ids in documents:
        starts.append(n)
        parts.append(ids[:budget - n])
        n += len(parts[-1])
        if n == budget:
            break
    return np.concatenate(parts or [np.zeros(0, np.uint16)]), np.array(starts, np.int64)


def split(config, documents, count):
    """
    {split: take() of its tokens}: every document is [separator] and its ids; a split drops the rest of its last one.
    Exits with code 2 where the documents (their number, in words: count) are too short.
    """
    encode, c = get_tokenizer(config.tokenizer)[0], config
    stream = (np.array([c.vocab_size - 1, *encode(document)], np.uint16) for document in documents)
    splits = {"val": take(stream, c.val_tokens), "train": take(stream, c.train_tokens)}
    if len(splits["train"][0]) < c.train_tokens:
        have = sum(len(tokens) for tokens, _ in splits.values())
        refuse(f"data={c.data} is too short: val_tokens={c.val_tokens} + train_tokens={c.train_tokens} want "
               f"{c.val_tokens + c.train_tokens} tokens, its {count} documents give {have} (each split "
               "drops the rest of its last one): lower them (and fitness_tokens), add text, or give shorter documents")
    epoch_of(c, len(split_fitness(*splits["train"], c.fitness_tokens)[1]))
    return splits


def write(config, splits, source):
    """
    Every file whole or not at all: written in a folder of its own under its final name, which torch.save puts into the
    file and so into its SHA-256, then moved, the .json last.
    """
    target, source = Path(config.data_dir), {**source, "fingerprint": fingerprint(splits)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for killed in target.glob(".writing-*"):
            shutil.rmtree(killed, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as folder:
            for name, (tokens, starts) in splits.items():
                torch.save(dict(tokens=torch.from_numpy(tokens), doc_starts=torch.from_numpy(starts),
                                bos_id=config.vocab_size - 1, seq_shuffle_seed={"val": 42, "train": 43}[name],
                                seq_size=config.sequence_len + 1),
                           os.path.join(folder, file_name(config, f"_{name}.pt")))
            np.save(array := io.BytesIO(), get_tokenizer(config.tokenizer)[2])      # numpy's own writing does not notice a full disk
            Path(folder, file_name(config, "_bytes.npy")).write_bytes(array.getbuffer())
            Path(folder, file_name(config, ".json")).write_text(json.dumps(source, indent=1) + "\n")
            for ending in ENDINGS:
                os.replace(os.path.join(folder, file_name(config, ending)), target / file_name(config, ending))
    except (OSError, RuntimeError) as e:            # torch.save turns the one into the other
        refuse(f"data_dir={config.data_dir}: cannot write there: "
               f"{getattr(e, 'strerror', None) or 'no space, or no right to'}; make room, or name another --data_dir")


def compare_with_published(config):
    """Says how FineWeb's files that are there compare with the published ones."""
    for name in ("val", "train"):
        path = Path(config.data_dir) / file_name(config, f"_{name}.pt")
        with open(path, "rb") as f:
            mine = hashlib.file_digest(f, "sha256").hexdigest()
        published = PUBLISHED.get((name, getattr(config, f"{name}_tokens"))) if config.tokenizer == "gpt2" else None
        verdict = ("none of this size is published" if published is None else
                   "equal to the published file" if mine == published else
                   f"DIFFERENT from the published {published} "
                   "(another version of torch may write other bytes for the same tokens)")
        print(f"data: {path} has SHA-256 {mine}: {verdict}")


def prepare_fineweb(config, there, source):
    """FineWeb, as the public script takes it: validation first, in file order."""
    if not {"_val.pt", "_train.pt"} <= there:
        if there:
            refuse(f"data_dir={config.data_dir} holds only a part of the FineWeb files "
                   f"({', '.join(file_name(config, e) for e in sorted(there))}): add the rest, or move them away")
        documents = progress_bar(streamed(**FINEWEB), unit="document", desc="FineWeb")
        write(config, split(config, documents, "streamed"), {**source, "source": FINEWEB})
    compare_with_published(config)


def prepare(config):
    """Write the data of a config, unless it is there. Exits with code 2 where other data is, or the text is too short."""
    there = {ending for ending in ENDINGS if (Path(config.data_dir) / file_name(config, ending)).exists()}
    source = dict(data=config.data, tokenizer=config.tokenizer, val_tokens=config.val_tokens, train_tokens=config.train_tokens)
    if config.data == "fineweb":
        return prepare_fineweb(config, there, source)
    documents = source_documents(config.data)
    source |= dict(documents=len(documents), text_sha256=hashlib.sha256("\0".join(documents).encode()).hexdigest())
    print(f"data: {config.data}, {len(documents)} documents, SHA-256 of the text {source['text_sha256']}")
    repeated = len(documents) - len(set(documents))
    if repeated:
        print(f"note: {repeated} of them repeat another: held-out text may be trained on, too")
    if ".json" in there:
        theirs = text_source(config)
        differ = differences({k: str(theirs.get(k))[:12] for k in source if k != "data"},
                             {k: str(source[k])[:12] for k in source if k != "data"})
        if differ:
            refuse(f"data_dir={config.data_dir} holds other data ({differ}); name another --data_dir")
        if there == set(ENDINGS):
            return print(f"data: {config.data_dir} holds it already")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(documents))
    splits = split(config, (documents[i] for i in order), len(documents))
    write(config, splits, source)
    used = sum(len(starts) for _, starts in splits.values())
    print(f"data: wrote {config.val_tokens:,} validation and {config.train_tokens:,} training tokens to {config.data_dir}, "
          f"from {used:,} of {len(documents):,} documents" + "; --train_tokens takes more" * (used < len(documents)))


def main(argv=None):
    config, _ = from_args(argv, __doc__)
    prepare(config)
    Run(config, load(config).fingerprint)       # a run directory of other data is refused here, before any launcher


if __name__ == "__main__":
    main()
