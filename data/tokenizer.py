"""Text <-> token ids. The separator that starts every document is the last id of each tokenizer."""
import re

import numpy as np

from infra.config import VOCAB_SIZE
from infra.console import fail

RANKS_NAME = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"         # of r50k_base.tiktoken in tiktoken's cache
BLANKS = 900_000            # in a row: near a million tiktoken panics, with a traceback of its own


def get_tokenizer(name):
    """(encode: text -> ids, decode: ids -> text, bytes of every id as uint8). The separator has 0 bytes."""
    bos = VOCAB_SIZE[name] - 1
    if name == "bytes":
        def decode_bytes(ids):
            return bytes(i for i in ids if i < bos).decode(errors="replace")
        return lambda text: list(text.encode()), decode_bytes, np.array([1] * bos + [0], np.uint8)
    import tiktoken         # here alone: the byte tokenizer needs no package
    try:
        encoding = tiktoken.get_encoding("r50k_base")           # the ids of "gpt2"
    except Exception as e:
        fail(f"tokenizer=gpt2: its ranks cannot be downloaded ({type(e).__name__}): connect once, or set "
             f"TIKTOKEN_CACHE_DIR to a folder with a copy of r50k_base.tiktoken, named {RANKS_NAME}")

    def encode(text):
        if len(text) > BLANKS and re.search(rf"(?<!\s)\s{{{BLANKS}}}", text):
            fail(f"tokenizer=gpt2: a document with {BLANKS:,} blanks in a row, which tiktoken cannot encode, "
                 f"begins with {text.strip()[:40]!r}: shorten them")
        return encoding.encode_ordinary(text)

    def decode(ids):
        return encoding.decode([i for i in ids if i != bos])
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(bos)]
    return encode, decode, np.array(sizes + [0], np.uint8)
