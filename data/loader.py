"""
Token files -> batches in the recipe's order, and the one loop over held-out sequences. Shapes: n sequences of
T + 1 tokens; inputs are [:, :-1], targets [:, 1:]. Attention crosses document boundaries.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import get_tokenizer
from infra.console import fail
from infra.files import read_json, read_tensors


def file_path(config, ending):
    """Of a data file: manual_train.pt, text_val.pt, fineweb_train.pt, ..."""
    name = config.data if config.data in ("manual", "fineweb") else "text"
    return Path(config.data_dir) / f"{name}{ending}"


def read_tokens(config, split):
    """(tokens uint16, doc_starts int64) of one split's file."""
    path = file_path(config, f"_{split}.pt")
    if not path.exists():
        fail(f"no data at '{path}': run python -m data.prepare on this config first")
    try:
        file = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        tokens, starts = file["tokens"].numpy(), file["doc_starts"].numpy()
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError("its arrays are of another kind")
    except Exception as e:          # torch.load raises nearly anything on damaged bytes
        fail(f"'{path}' is not a readable token file ({type(e).__name__}: {e!s:.90}): delete it, and its "
             ".json, and run python -m data.prepare again")
    return tokens, starts


def cut(tokens, sequence_len):
    """(n, T + 1): non-overlapping sequences in file order, the tail dropped."""
    n = len(tokens) // (sequence_len + 1)
    return tokens[:n * (sequence_len + 1)].reshape(n, sequence_len + 1)


def documents_of(sequences, doc_starts):
    """The document, from 0, of every target of sequences cut from the front of a file: (n * T,)."""
    position = np.arange(sequences.size).reshape(sequences.shape)[:, 1:].ravel()
    return np.searchsorted(doc_starts, position, side="right") - 1


def sequences_per_epoch(config, tokens):
    """Of so many training tokens: what can be cut, down to a multiple. Exits with code 2 where that is 0."""
    n = tokens // (config.sequence_len + 1) // config.epoch_multiple * config.epoch_multiple
    return n or fail(f"train_tokens={config.train_tokens}: the fitness set, of whole documents, leaves "
                     f"{tokens}; an epoch wants epoch_multiple={config.epoch_multiple} sequences of "
                     f"{config.sequence_len + 1}: raise train_tokens, or give shorter documents")


def split_fitness(tokens, starts, fitness_tokens):
    """Whole documents from the front until at least fitness_tokens: (fitness, training tokens and starts)."""
    ends = np.append(starts[1:], len(tokens))
    last = min(int(np.searchsorted(ends, fitness_tokens)), len(ends) - 1)
    return tokens[:ends[last]], tokens[ends[last]:], starts[last + 1:] - ends[last]


def fingerprint(splits):
    """SHA-256 of the tokens and document starts of both files: {"val": (tokens, starts), "train": ...}."""
    digest = hashlib.sha256()
    for array in (*splits["val"], *splits["train"]):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@dataclass
class Data:
    train: np.ndarray           # tokens
    doc_starts: np.ndarray
    fit: np.ndarray             # n, T + 1: the fitness set
    val: np.ndarray             # n, T + 1
    val_documents: np.ndarray   # n * T: the document of every target, from 0
    token_bytes: np.ndarray     # UTF-8 bytes of every token, 0 for the separator
    sequences_per_epoch: int    # that are trained on
    fingerprint: str            # SHA-256 of all tokens and document starts


def load(config):
    """The Data of a config. Exits with code 2 where it is missing, damaged or another config's."""
    splits = {split: read_tokens(config, split) for split in ("val", "train")}
    found = fingerprint(splits)
    if read_about(config).get("fingerprint", found) != found:
        fail(f"the files in data_dir='{config.data_dir}' are not what data.prepare wrote, their SHA-256 is "
             "another: delete them and run python -m data.prepare again")
    for split, (tokens, _) in splits.items():               # whole, but are they this config's?
        path, bos, n = file_path(config, f"_{split}.pt"), tokens[0], len(tokens)
        if bos != config.vocab_size - 1 or tokens.max() > bos:
            fail(f"'{path}' was not written with tokenizer={config.tokenizer} (its separator is {bos}): set "
                 "the tokenizer or another data_dir")
        if n != getattr(config, f"{split}_tokens"):
            fail(f"'{path}' holds {n} tokens: set {split}_tokens={n}, or prepare another data_dir")
    fitness, train, starts = split_fitness(*splits["train"], config.fitness_tokens)
    T, sizes = config.sequence_len, file_path(config, "_bytes.safetensors")     # the public script has none
    token_bytes = (read_tensors(sizes, "bytes of the tokens")[0]["token_bytes"].numpy() if sizes.exists() else
                   get_tokenizer(config.tokenizer)[2])
    fit, val = cut(fitness, T)[:config.fitness_tokens // (T + 1)], cut(splits["val"][0], T)
    return Data(train, starts, fit, val, documents_of(val, splits["val"][1]), token_bytes,
                sequences_per_epoch(config, len(train)), found)


def read_about(config):
    """What prepare.py noted of the text (NAME.json); {} for files of the public script."""
    path = file_path(config, ".json")
    return read_json(path) if path.exists() else {}


DOCUMENTS, SEQUENCES = 1000, 2000       # in the seeds of the two permutations


class Batches:
    """
    The training sequences of one trajectory, epoch after epoch without end. Each epoch reorders the documents
    (from the last epoch's order), concatenates them, cuts sequences, permutes these and drops the last ones,
    down to a multiple. `position`, the sequences taken so far, is the whole state, and may be set.
    """

    def __init__(self, data, sequence_len, seed):
        self.documents, self.per_epoch = np.split(data.train, data.doc_starts[1:]), data.sequences_per_epoch
        self.sequence_len, self.seed = sequence_len, seed
        self.position, self.epoch = 0, 0

    def permutation(self, epoch, n, salt):
        generator = torch.Generator().manual_seed(self.seed * 1009 + epoch + salt)
        return torch.randperm(n, generator=generator).numpy()

    def build(self, epoch):
        """The (per_epoch, T + 1) sequences of an epoch, which counts from 1, in order."""
        order = np.arange(len(self.documents))
        for e in range(1, epoch + 1):
            order = order[self.permutation(e, len(order), DOCUMENTS)]
        sequences = cut(np.concatenate([self.documents[i] for i in order]), self.sequence_len)
        return sequences[self.permutation(epoch, len(sequences), SEQUENCES)[:self.per_epoch]]

    def take(self, n):
        """The next n sequences, (n, T + 1) int64. They may straddle two epochs."""
        rows = []
        while n > 0:
            epoch, offset = divmod(self.position, self.per_epoch)
            if self.epoch != epoch + 1:
                self.epoch, self.sequences = epoch + 1, self.build(epoch + 1)
            rows.append(self.sequences[offset:offset + n])
            self.position += len(rows[-1])
            n -= len(rows[-1])
        return torch.from_numpy(np.concatenate(rows).astype(np.int64))


@torch.no_grad()
def score(model, sequences, batch_size):
    """Log-probability in nats of every target of held-out sequences (n, T + 1): (n * T,) float32 numpy."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    rows = torch.from_numpy(sequences.astype(np.int64)).split(batch_size)       # no padding
    log_p = [model.log_p(row[:, :-1].to(device), row[:, 1:].to(device)) for row in rows]
    model.train(training)
    return torch.cat(log_p).flatten().float().cpu().numpy()
