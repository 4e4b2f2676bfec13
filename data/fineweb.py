"""
FineWeb as the public Slowrun script takes it: documents in file order, val_tokens of validation, then, from the next
document on, train_tokens of training. Streamed: what came is kept in data_dir, and an interrupted download goes on.
"""
import glob
import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from data.loader import file_name
from errors import refuse
from files import differences, read_json, write_json
from world import progress_bar

SOURCE = dict(path="HuggingFaceFW/fineweb", name="sample-10BT", split="train",
              revision="9bb295ddab0e05d785b879661af7260fed5140fc")          # v1.4.0
SAVE_EVERY = 5_000                  # documents
PUBLISHED = {                       # (split, tokens) -> SHA-256 of the file that the public script wrote, with torch 2.10
    ("val", 10_000_000): "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
    ("train", 100_000_000): "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
}


def open_stream(**source):
    """A datasets.IterableDataset with the column text, read as it comes, from the hub or from .parquet files."""
    import datasets                         # slow, and needed here alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)         # retries for half a minute
    try:
        stream = datasets.load_dataset(**source, streaming=True, batch_size=100)       # rows read ahead are most of the memory
        columns = stream.column_names or list(next(iter(stream.take(1)), {}))
        if "text" not in columns:
            refuse(f"data: {name_of(source)} has no column 'text', only {', '.join(columns) or 'nothing'}; "
                   "rename the one with the documents")
        return stream.select_columns(["text"])
    except Exception as e:                  # anything, from a lost network to a torn file
        mend = ("is it a whole .parquet file?" if source["path"] == "parquet" else
                "connect, or put the public fineweb_val.pt and fineweb_train.pt into data_dir")
        refuse(f"data: cannot read {name_of(source)} ({type(e).__name__}): {mend}")


def name_of(source):
    return source.get("data_files") or source["path"]


def text_of(row, number, source):
    """A row's document; "" for none."""
    if not isinstance(row["text"], str | None):
        refuse(f"data: {name_of(source)}, row {number}: its column 'text' holds a {type(row['text']).__name__}, "
               "not a text; convert the column")
    return row["text"] or ""


def parquet_documents(path):
    """Its column text, a list. Exits with code 2 where there is none, or the file is damaged."""
    source = dict(path="parquet", data_files=glob.escape(str(path)), split="train")
    try:
        return [text_of(row, number, source) for number, row in enumerate(open_stream(**source))]
    except Exception as e:                  # damage far inside is met on the way
        refuse(f"data: {path} is damaged ({type(e).__name__}): replace it, or leave it out")


class Download:
    """The tokens of both splits, one after another, in a file that grows, and beside it the place in the stream."""

    def __init__(self, config):
        self.config, folder = config, Path(config.data_dir)
        self.tokens_path, self.state_path = folder / "fineweb.partial", folder / "fineweb.partial.json"
        self.of = dict(source=SOURCE, tokenizer=config.tokenizer,
                       val_tokens=config.val_tokens, train_tokens=config.train_tokens)
        self.tokens, self.documents, self.place = 0, 0, None
        if self.state_path.exists():
            begin_again = f"delete {self.state_path.name} and {self.tokens_path.name}, to begin again"
            state = read_json(self.state_path)
            of, self.tokens, self.documents, self.place = (state.get(key) for key in ("of", "tokens", "documents", "place"))
            if [type(x) for x in (of, self.tokens, self.documents, self.place)] != [dict, int, int, dict] or self.tokens < 0:
                refuse(f"{self.state_path} is damaged: {begin_again}")
            if of != self.of:
                refuse(f"{self.state_path} belongs to another download ({differences(of, self.of)}): "
                       f"finish that, {begin_again}, or name another --data_dir")
            if not self.tokens_path.exists() or self.tokens_path.stat().st_size < 2 * self.tokens:
                refuse(f"{self.tokens_path} has lost tokens: {begin_again}")

    def save(self, f, stream):
        f.flush()
        os.fsync(f.fileno())
        write_json(self.state_path, dict(of=self.of, tokens=self.tokens, documents=self.documents, place=stream.state_dict()))

    def run(self, encode):
        """Streams what is missing: every document is [bos] and its ids; the last of a split is cut, its rest dropped."""
        c, stream = self.config, open_stream(**SOURCE)
        total = c.val_tokens + c.train_tokens
        try:
            self.tokens_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.tokens_path, "ab") as f, progress_bar(
                    total=total, initial=self.tokens, unit="token", unit_scale=True, desc="FineWeb") as bar:
                f.truncate(2 * self.tokens)             # what was written after the last save comes again
                if self.place:
                    if self.place.keys() != stream.state_dict().keys():
                        raise ValueError("another kind of place in the stream")
                    stream.load_state_dict(self.place)
                for row in stream if self.tokens < total else ():
                    end = c.val_tokens if self.tokens < c.val_tokens else total
                    ids = np.array([c.vocab_size - 1, *encode(text_of(row, self.documents, SOURCE))],
                                   np.uint16)[:end - self.tokens]
                    f.write(ids.tobytes())
                    self.tokens, self.documents = self.tokens + len(ids), self.documents + 1
                    bar.update(len(ids))
                    if self.tokens == total:
                        break
                    if self.documents % SAVE_EVERY == 0:
                        self.save(f, stream)
                self.save(f, stream)
        except Exception as e:                          # a lost network, after many tries; a full disk; a folder that is none
            refuse(f"data=fineweb stopped after {self.tokens:,} of {total:,} tokens in {self.tokens_path} "
                   f"({type(e).__name__}: {e}): mend that and run this again, it goes on from its last save; "
                   f"if it stops at once, delete {self.tokens_path.name} and {self.state_path.name}")
        if self.tokens < total:
            refuse(f"data=fineweb ends after {self.tokens:,} tokens: val_tokens + train_tokens want {total:,}; lower them")

    def splits(self):
        """{split: (tokens uint16, mapped from disk, doc_starts int64)}."""
        tokens = np.memmap(self.tokens_path, np.uint16, "c")            # c: writable for torch's sake, never written
        parts = {"val": tokens[:self.config.val_tokens], "train": tokens[self.config.val_tokens:]}
        return {split: (part, np.flatnonzero(part == self.config.vocab_size - 1)) for split, part in parts.items()}

    def remove(self):
        self.state_path.unlink()
        self.tokens_path.unlink()


def compare(config):
    """Says how the files that are there compare with the published ones."""
    for split in ("val", "train"):
        path = Path(config.data_dir) / file_name(config, f"_{split}.pt")
        with open(path, "rb") as f:
            mine = hashlib.file_digest(f, "sha256").hexdigest()
        published = PUBLISHED.get((split, getattr(config, f"{split}_tokens"))) if config.tokenizer == "gpt2" else None
        verdict = ("none of this size is published" if published is None else
                   "equal to the published file" if mine == published else
                   f"DIFFERENT from the published {published} "
                   "(another version of torch may write other bytes for the same tokens)")
        print(f"data: {path} has SHA-256 {mine}: {verdict}")
