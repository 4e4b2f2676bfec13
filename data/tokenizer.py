"""
Text <-> token ids. The separator that starts every document is the last id of each tokenizer.
"""
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from config import VOCAB_SIZE
from errors import refuse
from files import write_whole

RANKS_NAME = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"         # of r50k_base in tiktoken's cache
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def install_ranks(path):
    """
    Put a local r50k_base.tiktoken where tiktoken looks before it downloads it.
    Exits with code 2 where it is another file.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR",
                            os.environ.get("DATA_GYM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache")))
    try:
        ranks = Path(path).read_bytes()
    except OSError as e:
        refuse(f"gpt2_ranks={path}: cannot read it: {e.strerror}; name a copy of r50k_base.tiktoken")
    if hashlib.sha256(ranks).hexdigest() != RANKS_SHA256:
        refuse(f"gpt2_ranks={path} is not r50k_base.tiktoken: wants the file with SHA-256 {RANKS_SHA256}")
    write_whole(Path(folder) / RANKS_NAME, lambda f: f.write(ranks))


def get_tokenizer(name):
    """(encode: text -> ids, decode: ids -> text, bytes of every id as uint8). The separator is the last id, of 0 bytes."""
    if name == "bytes":
        decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
        return lambda text: list(text.encode()), decode, np.array([1] * 256 + [0], np.uint8)
    import tiktoken         # here alone: the byte tokenizer needs no package
    try:
        encoding = tiktoken.get_encoding("r50k_base")       # the ids of "gpt2", from one file instead of two
    except Exception as e:
        refuse(f"tokenizer=gpt2: its ranks cannot be downloaded ({type(e).__name__}); "
               "connect once, give a copy of r50k_base.tiktoken to python -m data.prepare CONFIG --gpt2_ranks=FILE, "
               "set TIKTOKEN_CACHE_DIR to a folder that has them, or use tokenizer=bytes")
    bos = VOCAB_SIZE["gpt2"] - 1
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(bos)]
    return encoding.encode_ordinary, lambda ids: encoding.decode([i for i in ids if i != bos]), np.array(sizes + [0], np.uint8)
