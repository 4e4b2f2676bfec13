"""
How whatever is wrong is said: in one line, by one process of those that see it.
"""
import os
import sys
import time
from typing import NoReturn

from tqdm import tqdm

SILENCE = 5             # seconds a silent rank waits before it exits, so that the rank that says why ends first
prints = False          # whether a rank that is not its machine's first may print its errors: the first of each group may


def first_rank():
    """Whether this is the first of the processes that torchrun started, or the only one; known before they have met."""
    return os.environ.get("RANK", "0") == "0"


def first_here():
    """Whether this is the first of the processes on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def speak(yes=True):
    """Let this rank, too, print its errors, not only the first on its machine."""
    global prints
    prints = yes


def refuse(message, common=False, code=2) -> NoReturn:
    """
    One line on standard error, exit code 2 (bad input) or 1 (it went wrong on the way).
    common: every rank comes here, and rank 0 speaks for all; else one on each machine, which may be the only one to see it.
    """
    if first_rank() or not common and (prints or first_here()):
        tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)     # on its own line, whatever bars there are
    else:
        time.sleep(SILENCE)         # torchrun ends all ranks as soon as one has ended: the one that speaks comes first
    raise SystemExit(code)
