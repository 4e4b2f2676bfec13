"""
What a script prints: errors in one line, progress bars, the next command; to a terminal, pipe or file that
may vanish or fill up at any time.
"""
import functools
import io
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
tqdm.set_lock(threading.RLock())            # its own is shared by processes: one that is killed would keep it
FAILED, STOPPED = 1, 75                     # exit codes; STOPPED: asked to stop, and saved (EX_TEMPFAIL)


class Damaged(Exception):
    """A file that cannot be used."""

    def __init__(self, path, reason):
        super().__init__(f"'{path}' {reason}: restore it, or move it away")


def fail(message, code=2) -> NoReturn:
    """
    One line on standard error that says what is wrong and how to fix it. The first rank on a machine prints
    it at once; torchrun then ends the others, so that only what they alone have found is printed, too.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
        print(file=sys.stderr)                              # below the first rank's progress bar
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def print0(text, prints=None):
    """Print from the first rank (prints: whether from this one), at once."""
    if prints or prints is None and os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def progress_bar(iterable=None, **options):
    """tqdm's; in a log file a line now and then."""
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


class SafeStream:
    """Standard output or error that never raises: once it fails, what is printed is lost."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")       # ASCII, Latin-1: escape what cannot be encoded

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()                             # now, not when Python exits
        except OSError:                                     # its reader has gone, its disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:      # one of these, closed, would be a file's
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, SafeStream(stream))


def script(main):
    """Decorates main(argv): what goes wrong outside the code ends in one line, not in a traceback."""
    @functools.wraps(main)
    def wrapped(argv=None):
        protect_output()
        try:
            return main(argv)
        except KeyboardInterrupt:
            fail("interrupted; what is saved stays, run this again to resume", 130)
        except Damaged as e:
            fail(e)
        except OSError as e:                                # a full disk, no right to write, too long a name
            what = f"'{e.filename}': {e.strerror}" if e.filename else e
            fail(f"{what}: make room or fix it, and run this again; what was there stays")
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
                fail("the memory is too small: set a lower --micro_batch, or a smaller model (python -m "
                     "tools.plan says which fits); what is saved stays")
            if not isinstance(e, dist.DistError) and "gloo" not in str(e):
                raise
            time.sleep(5)                                   # that rank's own line comes first
            fail("another rank exited or hangs: see its last line, then start all again; what is saved "
                 "stays", FAILED)
    return wrapped


def next_command(name, argv):
    """
    The command that runs another script, or a module ("-m NAME"), from the user's folder with the same
    arguments (None: this process's) and, on this machine, as many ranks.
    """
    words, argv = [sys.executable], sys.argv[1:] if argv is None else argv
    if name.startswith("-m"):
        return f"PYTHONPATH={shlex.quote(os.path.relpath(ROOT))} {shlex.join([*words, *name.split(), *argv])}"
    nodes, local = (os.environ.get(f"{of}_WORLD_SIZE", "1") for of in ("GROUP", "LOCAL"))
    if nodes != "1" or local != "1":
        alone = ["--local-addr=127.0.0.1", "--standalone"]      # a host's own name may not resolve
        words += ["-m", "torch.distributed.run", *(alone if nodes == "1" else [f"--nnodes={nodes}"]),
                  f"--nproc_per_node={local}"]
    command = shlex.join([*words, os.path.relpath(ROOT / name), *argv])
    return command if nodes == "1" else f"{command}    # on every node, with the same --rdzv flags"
