"""
Text -> token files. One process: python -m data.prepare CONFIG [--name=value ...] [--gpt2_ranks=FILE]
Reads the Python manual that ships with Python (data=manual), local .txt, .jsonl and .parquet files, or FineWeb
(data=fineweb), splits whole documents into validation and training (the fitness set is the front of the training
file), and writes into data_dir:
  NAME_val.pt, NAME_train.pt   tokens (uint16), doc_starts (int64), bos_id, seq_shuffle_seed, seq_size
  NAME_bytes.npy               UTF-8 bytes of every token, 0 for the separator
  NAME.json                    what was read: source, SHA-256 of the text, Python, sizes; written last, it says "whole"
NAME is manual, text or fineweb. The format is the public Slowrun script's: its files and ours are interchangeable.
--gpt2_ranks: a local r50k_base.tiktoken, for tokenizer=gpt2 where tiktoken cannot download it; needed once.
"""
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from config import from_args, take_actions
from data import fineweb
from data.loader import epoch_of, file_name, fingerprint, load, split_fitness, text_source
from data.tokenizer import get_tokenizer, install_ranks
from errors import refuse
from population import Run

SHUFFLE_SEED = 0        # of the documents, before the split
ENDINGS = ("_val.pt", "_train.pt", "_bytes.npy", ".json")
KINDS = (".txt", ".jsonl", ".parquet")


def manual_documents(target_size=800):
    """
    The Python manual as documents of about target_size characters, cut between paragraphs. A paragraph that stands in
    several topics (a fifth of the text does), or inside a longer one, is kept once, so that no split holds another's.
    """
    from pydoc_data.topics import topics
    topics = [re.split(r"\n\s*\n", text.strip("\n")) for text in topics.values()]
    flat = lambda paragraph: " ".join(paragraph.split())
    everything = "\n".join(dict.fromkeys(flat(p) for topic in topics for p in topic))
    documents, seen = [], {""}
    for topic in topics:
        document = ""
        for paragraph in topic:
            key = flat(paragraph)
            if key in seen or len(key) >= 40 and everything.count(key) > 1:
                continue
            seen.add(key)
            document += paragraph + "\n\n"
            if len(document) >= target_size:
                documents.append(document)
                document = ""
        if document:
            documents.append(document)
    return documents


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


def file_documents(path):
    """
    Documents of a .txt file (separated by white-space-only lines; without any, one a line),
    a .jsonl or a .parquet (column text).
    """
    if path.suffix == ".parquet":
        return [document for document in fineweb.parquet_documents(path) if document.strip()]
    text = read_text(path)
    if path.suffix == ".txt":
        blank = re.search(r"\n[^\S\n]*\n", text.strip())
        parts = re.split(r"\n(?:[^\S\n]*\n)+", text) if blank else text.split("\n")
        return [part for part in parts if part.strip()]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"])
                documents[-1].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                refuse(f"data: {path} line {number} is no JSON object with a text in its column 'text'; "
                       "mend or remove the line")
    return [document for document in documents if document.strip()]


def source_documents(source):
    """
    The documents of data=manual, or of files and folders separated by commas, each file once.
    Exits with code 2 where there are none.
    """
    if source == "manual":
        return manual_documents()
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


def write(config, splits, token_bytes, source):
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
            for split, (tokens, starts) in splits.items():
                torch.save(dict(tokens=torch.from_numpy(tokens), doc_starts=torch.from_numpy(starts),
                                bos_id=config.vocab_size - 1, seq_shuffle_seed={"val": 42, "train": 43}[split],
                                seq_size=config.sequence_len + 1),
                           os.path.join(folder, file_name(config, f"_{split}.pt")))
            np.save(array := io.BytesIO(), token_bytes)         # numpy's own writing does not notice a full disk
            Path(folder, file_name(config, "_bytes.npy")).write_bytes(array.getbuffer())
            Path(folder, file_name(config, ".json")).write_text(json.dumps(source, indent=1) + "\n")
            for ending in ENDINGS:
                os.replace(os.path.join(folder, file_name(config, ending)), target / file_name(config, ending))
    except (OSError, RuntimeError) as e:            # torch.save turns the one into the other
        refuse(f"data_dir={config.data_dir}: cannot write there: "
               f"{getattr(e, 'strerror', None) or 'no space, or no right to'}; make room, or name another --data_dir")


def download_fineweb(config, there):
    if there:
        refuse(f"data_dir={config.data_dir} holds only a part of the FineWeb files "
               f"({', '.join(file_name(config, e) for e in sorted(there))}): add the rest, or move them away")
    encode, _, token_bytes = get_tokenizer(config.tokenizer)
    download = fineweb.Download(config)
    download.run(encode)
    source = dict(download.of, data="fineweb", documents=download.documents)
    write(config, download.splits(), token_bytes, source)
    download.remove()


def prepare(config):
    """Write the data of a config, unless it is there. Exits with code 2 where other data is, or the text is too short."""
    there = {ending for ending in ENDINGS if (Path(config.data_dir) / file_name(config, ending)).exists()}
    if config.data == "fineweb":
        if not {"_val.pt", "_train.pt"} <= there:
            download_fineweb(config, there)
        return fineweb.compare(config)
    documents = source_documents(config.data)
    source = dict(data=config.data, tokenizer=config.tokenizer, val_tokens=config.val_tokens, train_tokens=config.train_tokens,
                  documents=len(documents), text_sha256=hashlib.sha256("\0".join(documents).encode()).hexdigest())
    if config.data == "manual":
        source["python"] = platform.python_version()
    print(f"data: {config.data}, {len(documents)} documents, SHA-256 of the text {source['text_sha256']}")
    repeated = len(documents) - len(set(documents))
    if repeated:
        print(f"note: {repeated} of them repeat another: held-out text may be trained on, too")
    if ".json" in there:
        theirs = text_source(config)
        differ = [f"{k} {str(theirs.get(k))[:12]} there, {str(source[k])[:12]} wanted"
                  for k in source if k not in ("data", "python") and theirs.get(k) != source[k]]
        if differ:
            refuse(f"data_dir={config.data_dir} holds other data ({'; '.join(differ)}); name another --data_dir")
        if there == set(ENDINGS):
            return print(f"data: {config.data_dir} holds it already")
    encode, _, token_bytes = get_tokenizer(config.tokenizer)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(documents))
    stream = (np.array([config.vocab_size - 1, *encode(documents[i])], np.uint16) for i in order)
    splits = {"val": take(stream, config.val_tokens), "train": take(stream, config.train_tokens)}
    if len(splits["train"][0]) < config.train_tokens:
        have = sum(len(tokens) for tokens, _ in splits.values())
        refuse(f"data={config.data} is too short: val_tokens={config.val_tokens} + train_tokens={config.train_tokens} want "
               f"{config.val_tokens + config.train_tokens} tokens, its {len(documents)} documents give {have} (each split "
               "drops the rest of its last one): lower them (and fitness_tokens), add text, or give shorter documents")
    epoch_of(config, len(split_fitness(*splits["train"], config.fitness_tokens)[1]))        # before anything is written
    write(config, splits, token_bytes, source)
    used = sum(len(starts) for _, starts in splits.values())
    print(f"data: wrote {config.val_tokens:,} validation and {config.train_tokens:,} training tokens to {config.data_dir}, "
          f"from {used:,} of {len(documents):,} documents" + "; --train_tokens takes more" * (used < len(documents)))


def main(argv=None):
    options, argv = take_actions(argv, gpt2_ranks="")
    config = from_args(argv, __doc__)
    if options.gpt2_ranks:
        install_ranks(options.gpt2_ranks)
    prepare(config)
    Run(config, load(config).fingerprint)       # a run directory of other data is refused here, before any launcher


if __name__ == "__main__":
    main()
