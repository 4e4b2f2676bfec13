"""
Text -> token files. One process: python -m data.prepare CONFIG [--name=value ...] Reads the Python manual
(data=manual: manual.jsonl beside this file), local .txt, .jsonl and .parquet files, or FineWeb
(data=fineweb), splits whole documents into validation and training (the fitness set is the front of the
training file), and writes into data_dir:
  NAME_val.pt, NAME_train.pt   tokens (uint16), doc_starts (int64), bos_id, seq_shuffle_seed, seq_size
  NAME_bytes.safetensors       UTF-8 bytes of every token, 0 for the separator
  NAME.json                    what was read: source, SHA-256 of the text, sizes
NAME is manual, text or fineweb. The format is the public Slowrun script's: its files and ours are
interchangeable.
"""
import glob
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.loader import file_path, fingerprint, load, read_about, sequences_per_epoch, split_fitness
from data.tokenizer import get_tokenizer
from infra.config import from_args
from infra.console import fail, print0, progress_bar, script
from infra.files import clean_up, write_json, write_tensors, write_whole
from infra.run_directory import RunDirectory, differences

SHUFFLE_SEED = 0        # of the documents, before the split (FineWeb's stay in file order)
ENDINGS = ("_val.pt", "_train.pt", "_bytes.safetensors", ".json")
KINDS = (".txt", ".jsonl", ".parquet")
MANUAL = str(Path(__file__).with_name("manual.jsonl"))
FINEWEB = dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
               revision="9bb295ddab0e05d785b879661af7260fed5140fc")          # v1.4.0
PUBLISHED = {           # (ending, tokens) -> SHA-256 of the public script's file, written by torch 2.10
    ("_val.pt", 10_000_000): "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    ("_train.pt", 100_000_000): "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}


# ---------------------------------------------------------------------------------------- text to documents

def streamed(**source):
    """The column text of a Hugging Face data set, or of .parquet files, as it comes; "" where it is null."""
    import datasets                         # slow, and needed here alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for number, row in enumerate(datasets.load_dataset(**source, streaming=True, batch_size=100)):
        if not isinstance(row.get("text", 0), str | None):
            raise ValueError(f"row {number}, of the columns {', '.join(row)}, has no text in 'text'")
        yield row["text"] or ""


def json_text(number, line):
    """The document in a line of a .jsonl file; "" where it is null."""
    try:
        text = json.loads(line)["text"]
        text = "" if text is None else text
        text.encode()                       # a lone surrogate is no text
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"line {number} is no JSON object with a text in its column 'text'") from None


def paths_of(source):
    return [Path(os.path.expanduser(name.strip())) for name in source.split(",") if name.strip()]


def file_documents(path):
    """
    Of a .txt file (separated by white-space-only lines; without any, one a line), or the column text of a
    .jsonl or .parquet, where there is some. Raises ValueError and whatever reading raises.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        documents = streamed(path="parquet", data_files=glob.escape(str(path)), split="train")
    else:
        text = path.read_text("utf-8-sig")                      # any line ending becomes \n
        if "\0" in text:
            raise ValueError("it is binary, not text")
        paragraphs = kind == ".txt" and re.search(r"\n[^\S\n]*\n", text.strip())
        documents = re.split(r"\n(?:[^\S\n]*\n)+", text) if paragraphs else text.split("\n")
        if kind == ".jsonl":
            documents = [json_text(number, line) for number, line in enumerate(documents, 1) if line.strip()]
    return [document for document in documents if document.strip()]


def cannot_list(error):
    raise error                             # os.walk would leave the folder out


def files_below(folder):
    """
    The text files in it, in order, through links, too; each real folder once, as links may form a loop. All
    else is left out, counted and said.
    """
    files, left_out, seen = [], Counter(), set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=cannot_list):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [name for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in names):
            kind = "hidden" if path.name.startswith(".") else path.suffix.lower()
            if kind in KINDS:
                files.append(path)
            else:
                left_out[kind or "without an ending"] += 1
    if left_out:
        kinds = ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(9))
        print(f"data: '{folder}': {left_out.total()} files and hidden folders left out ({kinds})")
    return sorted(files)


def source_documents(source):
    """Of files and folders separated by commas, each real file once. Exits with code 2 on a bad one."""
    files, documents, empty = {}, [], []
    for path in paths_of(source):
        inside = files_below(path) if path.is_dir() else [path]
        if not inside or not path.exists() or inside[0].suffix.lower() not in KINDS:
            fail(f"data: '{path}' {'is no' if path.exists() else 'does not exist; name a'} .txt, .jsonl or "
                 ".parquet file, or a folder of them")
        for file in inside:
            files.setdefault(os.path.realpath(file), file)
    for path in files.values():
        try:
            found = file_documents(path)
        except Exception as e:              # missing, another encoding, torn, no such column
            fail(f"data: cannot read '{path}' ({type(e).__name__}: {e}): UTF-8 text, or rows with a column "
                 "'text', are read; fix it, or leave it out")
        documents += found
        empty += [] if found else [path]
    if not documents:
        fail(f"data={source!r} is empty: give .txt, .jsonl or .parquet files, or folders of them, with commas")
    if empty:
        print(f"data: {len(empty)} of {len(files)} files are empty, '{empty[0]}' the first")
    return documents


# -------------------------------------------------------------------------------------- documents to tokens

def first_tokens(documents, budget):
    """(tokens uint16, doc_starts int64) of the first `budget` tokens of documents' ids; the last is cut."""
    parts, starts, n = [], [], 0
    for ids in documents:
        starts.append(n)
        parts.append(ids[:budget - n])
        n += len(parts[-1])
        if n == budget:
            break
    return np.concatenate(parts or [np.zeros(0, np.uint16)]), np.array(starts, np.int64)


def tokenize(config, documents):
    """
    {split: its first_tokens()}: every document is [separator] and its ids; a split drops the rest of its
    last one. Exits with code 2 where the documents are too short.
    """
    encode, c = get_tokenizer(config.tokenizer)[0], config
    stream = (np.array([c.vocab_size - 1, *encode(document)], np.uint16) for document in documents)
    splits = {"val": first_tokens(stream, c.val_tokens), "train": first_tokens(stream, c.train_tokens)}
    have, count = (sum(len(arrays[i]) for arrays in splits.values()) for i in (0, 1))
    if have < c.val_tokens + c.train_tokens:
        fail(f"data={c.data} is too short: val_tokens={c.val_tokens} + train_tokens={c.train_tokens} need "
             f"{c.val_tokens + c.train_tokens} tokens, its {count} documents give {have}: lower them (and "
             "fitness_tokens), add text, or give shorter documents (each split drops the rest of its last "
             "one)")
    sequences_per_epoch(c, len(split_fitness(*splits["train"], c.fitness_tokens)[1]))       # its check
    return splits


def write(config, splits, about):
    """The files of a data_dir, the .json first: files without it are not ours to write again."""
    clean_up(Path(config.data_dir))
    write_json(file_path(config, ".json"), {**about, "fingerprint": fingerprint(splits)})
    for split, (tokens, starts) in splits.items():
        file = dict(tokens=torch.from_numpy(tokens), doc_starts=torch.from_numpy(starts),
                    bos_id=config.vocab_size - 1, seq_shuffle_seed={"val": 42, "train": 43}[split],
                    seq_size=config.sequence_len + 1)
        write_whole(file_path(config, f"_{split}.pt"), lambda temporary: torch.save(file, temporary))
    token_bytes = dict(token_bytes=torch.from_numpy(get_tokenizer(config.tokenizer)[2]))
    write_tensors(file_path(config, "_bytes.safetensors"), "bytes of the tokens", token_bytes)
    print0(f"data: wrote {config.val_tokens:,} validation and {config.train_tokens:,} training tokens to "
           f"'{config.data_dir}', from {sum(len(starts) for _, starts in splits.values()):,} documents; "
           "--train_tokens takes more of a longer text")


def compare_with_published(config):
    """Says how FineWeb's files that are there compare with the public script's."""
    for ending, tokens in (("_val.pt", config.val_tokens), ("_train.pt", config.train_tokens)):
        path = file_path(config, ending)
        with open(path, "rb") as f:
            mine = hashlib.file_digest(f, "sha256").hexdigest()
        published = PUBLISHED.get((ending, tokens)) if config.tokenizer == "gpt2" else None
        verdict = f"DIFFERENT from the published {published} (another torch may write other bytes)"
        if published in (None, mine):
            verdict = "equal to the published file" if published else "none of this size is published"
        print0(f"data: '{path}' has SHA-256 {mine}: {verdict}")


def prepare_fineweb(config, there, about):
    if not {"_val.pt", "_train.pt"} <= there:
        if there:
            fail(f"data_dir='{config.data_dir}' holds only a part of the FineWeb files "
                 f"(*{', *'.join(sorted(there))}): add the rest, or move them away")
        try:
            splits = tokenize(config, progress_bar(streamed(**FINEWEB), unit="document", desc="FineWeb"))
        except Exception as e:              # a lost network; nothing was written
            fail(f"data=fineweb: cannot read {FINEWEB['path']} ({type(e).__name__}: {e}): connect and run "
                 "this again, or put the public fineweb_val.pt and fineweb_train.pt into data_dir")
        write(config, splits, {**about, "source": FINEWEB})
    compare_with_published(config)


def prepare(config):
    """Write the data of a config, unless it is there. Exits with code 2 where other data is there."""
    there = {ending for ending in ENDINGS if file_path(config, ending).exists()}
    about = {name: getattr(config, name) for name in ("data", "tokenizer", "val_tokens", "train_tokens")}
    if config.data == "fineweb":
        return prepare_fineweb(config, there, about)
    documents = source_documents(MANUAL if config.data == "manual" else config.data)
    text_sha256 = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    about |= dict(documents=len(documents), text_sha256=text_sha256)
    print0(f"data: {config.data}, {len(documents)} documents, SHA-256 of the text {about['text_sha256']}")
    repeated = len(documents) - len(set(documents))
    if repeated:
        print0(f"note: {repeated} of them repeat another: held-out text may be trained on, too")
    if there and ".json" not in there:
        fail(f"data_dir='{config.data_dir}' holds *{', *'.join(sorted(there))} without what data.prepare "
             "noted of them: move them away, or name another --data_dir")
    if there:
        theirs, mine = ({k: of.get(k) for k in about if k != "data"} for of in (read_about(config), about))
        if theirs != mine:
            fail(f"data_dir='{config.data_dir}' holds other data ({differences(theirs, mine)}); name another "
                 "--data_dir")
        if there == set(ENDINGS):
            return print0(f"data: '{config.data_dir}' holds it already")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(documents))
    write(config, tokenize(config, (documents[i] for i in order)), about)


@script
def main(argv=None):
    config, _ = from_args(argv, __doc__)
    prepare(config)
    RunDirectory(config, load(config).fingerprint)       # one of other data ends here, before any launcher


if __name__ == "__main__":
    main()
