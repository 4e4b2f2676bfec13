"""
Text -> token files. One process: python -m data.prepare CONFIG [--name=value ...] Reads the Python manual
(data=manual), local .txt, .jsonl and .parquet files, or FineWeb (data=fineweb), splits whole documents into
validation and training (the fitness set is the front of the training file), and writes into data_dir:
  NAME_val.pt, NAME_train.pt   tokens (uint16), doc_starts (int64), bos_id, seq_shuffle_seed, seq_size
  NAME_bytes.safetensors       UTF-8 bytes of every token, 0 for the separator
  NAME.json                    what was read: source, SHA-256 of the text, sizes
NAME is manual, text or fineweb. The format is the public Slowrun script's: its files do as well.
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
from infra.console import fail, progress_bar, script
from infra.files import clean_up, lock, write_json, write_tensors, write_whole
from infra.run_directory import RunDirectory, differences

SHUFFLE_SEED = 0        # of the documents, before the split (FineWeb's stay in file order)
ENDINGS = {"_val.pt", "_train.pt", "_bytes.safetensors", ".json"}
MANUAL = str(Path(__file__).with_name("manual.jsonl"))
FINEWEB = dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
               revision="9bb295ddab0e05d785b879661af7260fed5140fc")          # v1.4.0
PUBLISHED = {           # SHA-256 of the public script's files, written by torch 2.10
    "_val.pt": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    "_train.pt": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf"}


# ---------------------------------------------------------------------------------------- text to documents

def texts(rows):
    """Their column text, "" where it is null. Raises ValueError where there is none."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("text", 0), str | None):
            raise ValueError(f"row {number} has no text in a column 'text': {str(row):.80}")
        yield row["text"] or ""


def streamed(**source):
    """The texts of a Hugging Face data set, or of .parquet files, as they come."""
    import datasets                         # slow, and needed here alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return texts(datasets.load_dataset(**source, streaming=True, batch_size=100))


def file_documents(path):
    """
    Of a .txt file (separated by white-space-only lines; without any, one a line), or the texts of a .jsonl or
    .parquet. Raises ValueError and whatever reading raises.
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
        if kind == ".jsonl":                                    # as one list: errors then name the line
            rows = ",\n".join(line if line.strip() else '{"text": null}' for line in documents)
            documents = texts(json.loads(f"[{rows}]"))
    return [text for text in documents if text.strip() and text.encode()]       # a lone surrogate raises


def text_files(paths, left_out, seen):
    """
    Those among paths and in the folders among them, in order, through links, too; each real one once, for
    links may form a loop. What is hidden in a folder or of another kind is counted in left_out.
    """
    for path in paths:
        kind, real = path.suffix.lower(), os.path.realpath(path)
        if real in seen:
            continue
        if path.is_dir():
            seen.add(real)
            inside = sorted(path.iterdir())
            shown = [p for p in inside if not p.name.startswith(".")]
            left_out["hidden"] += len(inside) - len(shown)
            yield from text_files(shown, left_out, seen)
        elif kind in (".txt", ".jsonl", ".parquet") and not path.is_fifo():
            seen.add(real)
            yield path
        else:
            left_out[kind or "without an ending"] += 1


def source_documents(paths):
    """Of files and folders. Exits with code 2 where one has no text that can be read."""
    files, documents = {}, []
    for path in paths:
        left_out = Counter()
        found = list(text_files([path], left_out, set())) or fail(
            f"data: '{path}' is no .txt, .jsonl or .parquet file, nor a folder of them")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
        if +left_out:
            print(f"data: '{path}': left out {', '.join(f'{n} {kind}' for kind, n in left_out.items() if n)}")
    for path in files.values():
        try:
            found = file_documents(path)
        except Exception as e:              # missing, another encoding, torn, no such column
            fail(f"data: cannot read '{path}' ({type(e).__name__}: {e}): UTF-8 text, or rows with a column "
                 "'text', are read; fix it, or leave it out")
        documents += found
        if not found:
            print(f"data: '{path}' is empty")
    return documents


def fineweb_documents():
    try:
        yield from progress_bar(streamed(**FINEWEB), unit="document", desc="FineWeb")
    except Exception as e:                  # a lost network; nothing was written
        fail(f"data=fineweb: cannot read {FINEWEB['path']} ({type(e).__name__}: {e}): connect and run this "
             "again, or put the public fineweb_val.pt and fineweb_train.pt into data_dir")


# -------------------------------------------------------------------------------------- documents to tokens

def tokenize(config, documents):
    """
    {split: (tokens uint16, doc_starts int64)}: every document is [separator] and its ids; a split drops the
    rest of its last one. Exits with code 2 where the documents are too short.
    """
    encode, c, splits = get_tokenizer(config.tokenizer)[0], config, {}
    stream = (np.array([c.vocab_size - 1, *encode(document)], np.uint16) for document in documents)
    for split, budget in (("val", c.val_tokens), ("train", c.train_tokens)):
        parts, starts, n = [], [], 0
        while n < budget and (ids := next(stream, None)) is not None:
            starts.append(n)
            parts.append(ids[:budget - n])
            n += len(parts[-1])
        if n < budget:
            fail(f"data={c.data} is too short: {split}_tokens={budget}, and there are {n} in {len(starts)} "
                 "documents: lower val_tokens and train_tokens, add text, or give shorter documents (each "
                 "split drops the rest of its last one)")
        splits[split] = np.concatenate(parts), np.array(starts, np.int64)
    sequences_per_epoch(c, len(split_fitness(*splits["train"], c.fitness_tokens)[1]))       # its check
    return splits


def holds(config, about):
    """Whether data_dir has these files already. Exits with code 2 where it has others: they stay."""
    there = {ending for ending in ENDINGS if file_path(config, ending).exists()}
    if config.data == "fineweb" and there == {"_val.pt", "_train.pt"}:          # the public script's
        return True
    if there and ".json" not in there:
        fail(f"data_dir='{config.data_dir}' has *{', *'.join(sorted(there))}, without data.prepare's *.json: "
             "add the rest, move them away, or name another --data_dir")
    theirs, mine = ({k: of.get(k) for k in about if k != "data"} for of in (read_about(config), about))
    if there and theirs != mine:
        fail(f"data_dir='{config.data_dir}' holds other data ({differences(theirs, mine)}); name another "
             "--data_dir")
    return there == ENDINGS


def write(config, splits, about):
    """The files of a data_dir, the .json first: files without it are not ours to write again."""
    write_json(file_path(config, ".json"), {**about, "fingerprint": fingerprint(splits)})
    for split, (tokens, starts) in splits.items():
        file = dict(tokens=torch.from_numpy(tokens), doc_starts=torch.from_numpy(starts),
                    bos_id=config.vocab_size - 1, seq_shuffle_seed={"val": 42, "train": 43}[split],
                    seq_size=config.sequence_len + 1)
        write_whole(file_path(config, f"_{split}.pt"), lambda temporary: torch.save(file, temporary))
    token_bytes = dict(token_bytes=torch.from_numpy(get_tokenizer(config.tokenizer)[2]))
    write_tensors(file_path(config, "_bytes.safetensors"), "bytes of the tokens", token_bytes)
    print(f"data: wrote {config.val_tokens:,} validation and {config.train_tokens:,} training tokens to "
          f"'{config.data_dir}'; --train_tokens takes more of a longer text")


def names_of(data):
    return [MANUAL] if data == "manual" else [name.strip() for name in data.split(",") if name.strip()]


def prepare(config):
    """Write the data of a config, unless it is there. Of two processes at once the first one's stays."""
    about = {name: getattr(config, name) for name in ("data", "tokenizer", "val_tokens", "train_tokens")}
    if config.data == "fineweb":
        documents, about["source"] = fineweb_documents(), FINEWEB
    else:
        paths = [Path(os.path.expanduser(name)) for name in names_of(config.data)]
        gone = [path for path in paths if not path.exists()]
        theirs = read_about(config).get("data", "")
        if gone and names_of(theirs) == names_of(config.data) and holds(config, about):
            return print(f"note: '{gone[0]}' is gone, its tokens in '{config.data_dir}' stand")
        documents = source_documents(paths) or fail(
            f"data={config.data!r} is empty: name .txt, .jsonl or .parquet files, or folders, with commas")
        text_sha256 = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        about |= dict(documents=len(documents), text_sha256=text_sha256)
        repeated = len(documents) - len(set(documents))         # held-out text may be trained on, too
        print(f"data: {config.data}, {len(documents)} documents, of which {repeated} repeat another; "
              f"SHA-256 {text_sha256}")
        documents = [documents[i] for i in np.random.default_rng(SHUFFLE_SEED).permutation(len(documents))]
    if holds(config, about):
        return print(f"data: '{config.data_dir}' holds it already")
    splits, folder = tokenize(config, documents), Path(config.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", "", wait=True):
        if not holds(config, about):
            clean_up(folder)
            write(config, splits, about)


@script
def main(argv=None):
    config, _ = from_args(argv, __doc__)
    prepare(config)
    found = load(config).fingerprint
    for ending, published in PUBLISHED.items() if config.data == "fineweb" else ():
        mine = hashlib.sha256(file_path(config, ending).read_bytes()).hexdigest()
        verdict = "the published file" if mine == published else "not the published file, of the 1.8B configs"
        print(f"data: '{file_path(config, ending)}' has SHA-256 {mine}: {verdict}")
    RunDirectory(config, found)             # one of other data ends here, before any launcher


if __name__ == "__main__":
    main()
