"""
Text <-> token ids. The separator that starts every document is the last id of each tokenizer.
"""
import numpy as np

from infra.config import VOCAB_SIZE
from infra.console import exit_with_error

RANKS_NAME = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"         # of r50k_base.tiktoken in tiktoken's cache


def get_tokenizer(name):
    """(encode: text -> ids, decode: ids -> text, bytes of every id as uint8). The separator has 0 bytes."""
    if name == "bytes":
        decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
        return lambda text: list(text.encode()), decode, np.array([1] * 256 + [0], np.uint8)
    import tiktoken         # here alone: the byte tokenizer needs no package
    try:
        encoding = tiktoken.get_encoding("r50k_base")           # the ids of "gpt2", from one file instead of two
    except Exception as e:
        exit_with_error(f"tokenizer=gpt2: its ranks cannot be downloaded ({type(e).__name__}): connect once, or set "
                        f"TIKTOKEN_CACHE_DIR to a folder with a copy of r50k_base.tiktoken, named {RANKS_NAME}")
    bos = VOCAB_SIZE["gpt2"] - 1
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(bos)]
    return encoding.encode_ordinary, lambda ids: encoding.decode([i for i in ids if i != bos]), np.array(sizes + [0], np.uint8)
