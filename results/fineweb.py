"""
How much memory and time the record's data takes: python results/fineweb.py TEXT [FOLDER]      (no network; 2 GB of disk)
Makes a .parquet file of documents of about 3,000 characters from the lines of a text file, over and over, until it holds
more than 110M tokens, and prepares configs/1p8b.py's data from it as if it were FineWeb; writes results/fineweb.md.
"""
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import from_args                                                # noqa: E402
from data import fineweb, prepare                                           # noqa: E402
from results.demo import commit                                             # noqa: E402


def documents_of(text):
    """Lines joined to about 3,000 characters, FineWeb's mean."""
    documents, document = [], ""
    for line in text.split("\n"):
        document += line + "\n"
        if len(document) > 3000:
            documents.append(document)
            document = ""
    return documents


def write_parquet(path, documents, characters):
    """In row groups of 1,000 rows, the documents over and over until so many characters are there."""
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("text", pa.string())])) as writer:
        written = 0
        while written < characters:
            rows = [documents[(written + i) % len(documents)] for i in range(1000)]
            writer.write_table(pa.table({"id": [str(i) for i in range(1000)], "text": rows}))
            written += sum(map(len, rows))


def main():
    text, folder = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    documents = documents_of(text.read_text(encoding="utf-8"))
    if not (folder / "many.parquet").exists():
        write_parquet(folder / "many.parquet", documents, 560_000_000)
    fineweb.SOURCE = dict(path="parquet", data_files=str(folder / "many.parquet"), split="train")
    began = time.perf_counter()
    argv = [str(ROOT / "configs" / "1p8b.py"), f"--data_dir={folder / 'data'}", f"--run_dir={folder / 'run'}"]
    prepare.main(argv)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    config = from_args(argv, "")
    (ROOT / "results" / "fineweb.md").write_text(f"""# The record's data, prepared

Printed by `python results/fineweb.py {text.name}` at commit {commit()}: {config.val_tokens:,} + {config.train_tokens:,} tokens of GPT-2 BPE from a local .parquet
file in the place of FineWeb's stream, documents of 3,000 characters in row groups of 1,000; Python {platform.python_version()}, {os.cpu_count()} CPU cores ({platform.machine()}).

Peak memory of the process {peak:.2f} GiB, torch's and pyarrow's own and the check of the files at the end included; {seconds:,.0f} s, most of it in the tokenizer.
""")
    print((ROOT / "results" / "fineweb.md").read_text())


if __name__ == "__main__":
    main()
