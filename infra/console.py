"""
What a script shows its user: errors in one line, progress bars, the next command; on a terminal, a pipe or a
file that may vanish or fill up at any time.
"""
import contextlib
import functools
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
BAD_INPUT, FAILED, STOPPED = 2, 1, 75       # exit codes; STOPPED: asked to stop, and saved (EX_TEMPFAIL)


class Damaged(Exception):
    """Why a file cannot be used, and what to do about it."""


def fail(message, code=BAD_INPUT, wait=False) -> NoReturn:
    """
    One line on standard error that says what is wrong and how to fix it. The first rank on a machine prints
    it at once; torchrun then ends the others, which may have found the same. They (wait: this one, too) wait,
    and print what they alone have found.
    """
    if wait or os.environ.get("LOCAL_RANK", "0") != "0":
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
        except (OSError, ValueError):                       # its reader has gone, its disk is full
            with contextlib.suppress(OSError, ValueError):  # it is no file, or closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    for descriptor in (0, 1, 2):                            # a closed one would be the next file's
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure") and not isinstance(stream, SafeStream):
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
        except torch.OutOfMemoryError:
            fail("this GPU's memory is too small: set a lower --micro_batch (python -m tools.plan says "
                 "which fits); what is saved stays")
        except RuntimeError as e:
            if "allocate memory" in str(e):
                fail("this machine's memory is too small for this model; what is saved stays")
            if not isinstance(e, dist.DistError) and "gloo" not in str(e):
                raise
            fail("another rank exited or hangs: see its last line, then start all again; what is saved "
                 "stays", FAILED, wait=True)
    return wrapped


def next_command(name, argv):
    """
    The command that runs another script, or a module ("-m NAME"), from the user's folder with the same
    arguments (None: this process's) and, on this machine, as many ranks.
    """
    words, local = [sys.executable], os.environ.get("LOCAL_WORLD_SIZE", "1")
    argv = sys.argv[1:] if argv is None else argv
    if name.startswith("-m"):
        return f"PYTHONPATH={shlex.quote(os.path.relpath(ROOT))} {words[0]} {name} {shlex.join(argv)}"
    if local != "1":
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        alone = ["--local-addr=127.0.0.1", "--standalone"]      # a host's own name may not resolve
        words += ["-m", "torch.distributed.run", *(alone if nodes == "1" else [f"--nnodes={nodes}"]),
                  f"--nproc_per_node={local}"]
    command = shlex.join([*words, os.path.relpath(ROOT / name), *argv])
    return command if "nnodes" not in command else f"{command}    # on every node, with the same --rdzv flags"
