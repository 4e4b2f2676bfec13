"""
Files that are whole or not there, and that say when they are damaged: JSON, and named tensors with what they are. Each
carries a SHA-256 that is checked when it is read, so that no flipped bit passes; what comes from elsewhere can hold tensors
and plain values only.
"""
import contextlib
import hashlib
import json
import os

import torch

from errors import refuse

FORMAT = 2                  # of all files below; to be raised where an older reader would go wrong


def write_whole(path, save):
    """
    Write a file whole or not at all: save(open file) goes to a temporary name beside it, renamed when on disk. Where that
    fails (a full disk): one line, exit code 2, and what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)      # the new name, too, outlives a power cut
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as e:                # torch.save turns the one into the other
        reason = next((x.strerror for x in (e, e.__context__, e.__cause__) if isinstance(x, OSError)), str(e).split("\n")[0])
        refuse(f"{path} could not be written: {reason}; make room or mend it, and run this again: what was there stays")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder, pattern):
    """Remove temporary files that killed writers left, by this pattern; to be called by whom nobody else writes beside."""
    for path in folder.glob(pattern):
        if path.suffix[1:].isdecimal():
            with contextlib.suppress(OSError):
                path.unlink()


def sha256_of(value):
    """A plain value's SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    value = {"format": FORMAT, **value}
    write_whole(path, lambda f: f.write((json.dumps({**value, "sha256": sha256_of(value)}, indent=1) + "\n").encode()))


def read_json(path):
    """What write_json wrote. Exits with code 2 where it is damaged or of a newer version."""
    mend = "restore it, or delete it and run the script that writes it again"
    try:
        value = dict(json.loads(path.read_text()))
        kept, version = value.pop("sha256", None), int(value.get("format", 0))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        refuse(f"{path} is not readable ({type(e).__name__}): {mend}")
    if version > FORMAT:
        refuse(f"{path} was written by a newer version of this code (format {version}, this reads {FORMAT}): update it")
    if kept != sha256_of(value):
        refuse(f"{path} is damaged, or was not written by this code: {mend}")
    return value


def differences(theirs, mine):
    """The keys in which two identities differ, with both values, as text; empty where they agree. theirs: from a file."""
    if not isinstance(theirs, dict):
        return "it has no identity"
    return "; ".join(f"{k} is {theirs.get(k)} there and {mine.get(k)} here"
                     for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k))


def digest(tensors):
    """SHA-256 of named tensors: names, types, shapes, contents."""
    sha = hashlib.sha256()
    for name, w in sorted(tensors.items()):
        sha.update(f"{name} {w.dtype} {tuple(w.shape)} ".encode())
        sha.update(w.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


class Damaged(Exception):
    """Why a file of tensors cannot be used."""


def load(path):
    """What a file of tensors and plain values holds, the tensors mapped from disk. Raises Damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as e:      # torch.load raises nearly anything on damaged bytes
        raise Damaged(f"is not readable ({type(e).__name__})") from None


def dense(w):
    """Whether a tensor from a file is what it seems: its elements lie there one after another."""
    return (isinstance(w, torch.Tensor)
            and w.layout == torch.strided
            and not w.is_meta
            and not w.is_conj()
            and not w.is_neg()
            and w.is_contiguous())


def save_tensors(path, tensors, **about):
    """A file of named tensors, and of what they are: plain values, as one JSON text. Returns the tensors' SHA-256."""
    sha256 = digest(tensors)
    about = json.dumps({"format": FORMAT, **about, "sha256": sha256}, sort_keys=True)
    file = {"tensors": tensors, "about": about, "about_sha256": hashlib.sha256(about.encode()).hexdigest()}
    write_whole(path, lambda f: torch.save(file, f))
    return sha256


def load_tensors(path, check=True):
    """
    (tensors, mapped from disk; about) of save_tensors. check: all contents are read and compared with their SHA-256.
    Raises Damaged.
    """
    file = load(path)
    try:
        tensors, text = file["tensors"], file["about"]
        about = json.loads(text)
        if about["format"] > FORMAT:
            raise Damaged(f"was written by a newer version of this code (format {about['format']}, this reads {FORMAT})")
        whole = (file["about_sha256"] == hashlib.sha256(text.encode()).hexdigest()
                 and all(isinstance(n, str) and dense(w) for n, w in tensors.items()))
        whole = whole and isinstance(about["sha256"], str) and (not check or digest(tensors) == about["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError):
        raise Damaged("is not a file of this code") from None
    if not whole:
        raise Damaged("is damaged, its SHA-256 is another")
    return tensors, about
