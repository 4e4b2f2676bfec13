"""
Files that are whole or not there, and that show by a SHA-256 when they are damaged: JSON, and named tensors
(safetensors) with what they are. Neither can hold code: a stranger's files are safe.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra.console import Damaged, fail

FORMAT = 3                  # of all files below; another one is refused
WRITING = f".writing-{socket.gethostname()}-"           # and the process: its unfinished files


def write_whole(path, save):
    """save(temporary path), flushed to disk, then renamed. OSError: what was there before still is."""
    temporary = path.parent / f"{WRITING}{os.getpid()}" / path.name     # torch.save writes the name, too
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):      # a file system that cannot flush folders
            flush_to_disk(path.parent)          # the new name, too, outlives a power cut
    except (OSError, RuntimeError, SafetensorError) as e:       # the libraries turn the first into others
        reason = getattr(e, "strerror", None) or e
        raise OSError(errno.EIO, f"could not be written ({reason})", str(path)) from e
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)


def flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_up(folder):
    """Remove what killed writers on this machine left in it; what is alive may still be writing."""
    for path in folder.glob(f"{WRITING}*"):
        try:
            os.kill(int(path.name.removeprefix(WRITING)), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError):
            pass                                # another user's process; no number


def lock(path, text, wait=False):
    """
    The open file, with this text in it, locked until it is closed or the process ends, however. Where another
    process has it: wait for that, or exit with code 2.
    """
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        fail(f"another process writes to '{path.parent}': wait for it or stop it, or name another --run_dir")
    except OSError:
        pass                                    # a file system without locks
    file.truncate(0)
    print(text, end="", file=file, flush=True)
    return file


def append_json(path, value):
    """A line of JSON at the file's end, in one write; one that a kill tore stays on its own. OSError, too."""
    with open(path, "ab+", buffering=0) as f:
        torn = f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n"
        line = (b"\n" if torn else b"") + json.dumps(value).encode() + b"\n"
        try:
            written = f.write(line)
        except OSError as e:
            raise OSError(e.errno, e.strerror, f.name) from e
        if written < len(line):
            raise OSError(errno.ENOSPC, "No space left on device", f.name)


def sha256_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_json(value, kind):
    """A dict of plain values as JSON, with the format, its kind and its SHA-256 inside."""
    value = {"format": FORMAT, "kind": kind, **value}
    return json.dumps({**value, "sha256": sha256_of(value)}, indent=1)


def from_json(text, path, kind):
    """The dict that to_json made this text of, as this kind. Raises Damaged."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        value = json.loads(text)
        if value.pop("sha256") == sha256_of(value) and value["format"] == FORMAT:
            if value["kind"] != kind:
                raise Damaged(path, f"holds something else, {value['kind']}")
            return value
    raise Damaged(path, f"is damaged, or of another version of this code (this reads format {FORMAT})")


def write_json(path, value):
    write_whole(path, lambda temporary: temporary.write_text(to_json(value, path.name) + "\n"))


def read_json(path):
    """What write_json wrote. Raises Damaged, OSError."""
    return from_json(path.read_bytes(), path, path.name)


def digest(tensors):
    """SHA-256 of named tensors: names, types, shapes, contents."""
    sha = hashlib.sha256()
    for name, w in sorted(tensors.items()):
        sha.update(f"{name} {w.dtype} {tuple(w.shape)} ".encode())
        sha.update(w.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_tensors(tensors, path, metadata):
    """safetensors' save_file, for all whom the umask lets read: 0.8 writes for the owner alone."""
    save_file(tensors, path, metadata)
    with contextlib.suppress(OSError):          # a file system without modes
        os.chmod(path, path.parent.stat().st_mode & 0o666)


def write_tensors(path, kind, tensors, **about):
    """Named CPU tensors, and what they are: plain values, with their SHA-256 as about["tensors_sha256"]."""
    about["tensors_sha256"] = digest(tensors)
    # one entry of metadata: safetensors writes several in any order, and equal files would differ
    metadata = {"about": to_json(about, kind)}
    write_whole(path, lambda temporary: save_tensors(tensors, temporary, metadata))


def read_tensors(path, kind, check=True):
    """(tensors, mapped from disk; about). check: all contents are compared with their SHA-256."""
    try:
        with safe_open(path, "pt") as file:
            about = from_json(file.metadata()["about"], path, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError) as e:
        raise Damaged(path, f"is not readable ({type(e).__name__}: {e})") from None
    if check and digest(tensors) != about["tensors_sha256"]:
        raise Damaged(path, "is damaged, checksum mismatch")
    return tensors, about
