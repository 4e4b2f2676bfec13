"""The README against the repository: its length, its table of files, the commands and files that it names."""
import re

from infra.config import FIELDS
from tests.conftest import ROOT
from tools.generate import OPTIONS

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) < 200


def test_the_tour_prints_the_real_table():
    rows = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.M))
    files = {str(p.relative_to(ROOT)) for pattern in ("*.py", "data/*.py", "infra/*.py", "tools/*.py") for p in ROOT.glob(pattern)
             if p.stat().st_size}
    assert rows.keys() == files
    for file, lines in rows.items():        # a small change need not touch the README
        assert abs(int(lines) - len((ROOT / file).read_text().splitlines())) <= 20, file


def test_what_it_names_exists():
    for path in set(re.findall(r"\b(?:configs|tools|tests|results|data)/[\w/]+\.(?:py|md|png|json)\b", README)):
        assert (ROOT / path).exists() or path.startswith("data/fineweb"), path
    for module in re.findall(r"python -m (infra\.\w+|data\.\w+|tools\.\w+|tests\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for name in re.findall(r"--(\w+)=", README):
        assert name in {*FIELDS, *OPTIONS, "beside", "epochs", "snapshots", "rounds", "slowrun", "steps",
                        "nproc_per_node"}, name
