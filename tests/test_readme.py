"""README.md and docs/ against the repository: lengths, tables of files, quoted code, what they name."""
import re

from infra.config import FIELDS
from tests.conftest import ROOT
from tools import evaluate, export, generate, log

README, RUNNING = (ROOT / "README.md").read_text(), (ROOT / "docs" / "running.md").read_text()


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 110


def test_the_tours_print_the_real_tables():
    for text, patterns in ((README, ("*.py", "data/*.py", "infra/*.py")), (RUNNING, ("tools/*.py",))):
        rows = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", text, re.M))
        files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.stat().st_size]
        assert rows.keys() == {str(path.relative_to(ROOT)) for path in files}
        for file, lines in rows.items():        # a small change need not touch the table
            assert abs(int(lines) - len((ROOT / file).read_text().splitlines())) <= 20, file


def test_the_quoted_code_is_there():
    quoted = README.split("## The three primitives")[1].split("\n## ")[0]
    for file, block in re.findall(r"\]\((\w+\.py)\).*?```python\n(.*?)```", quoted, re.S):
        for line in block.splitlines():
            assert line.startswith("# ") or line in (ROOT / file).read_text().splitlines(), line


def test_what_they_name_exists():
    text = README + RUNNING
    folders = "configs|tools|tests|results|data|docs"
    for path in set(re.findall(rf"\b(?:{folders})/[\w/]+\.(?:py|md|png|json)\b", text)):
        assert (ROOT / path).exists() or path.startswith("data/fineweb"), path
    for module in re.findall(r"python -m (infra\.\w+|data\.\w+|tools\.\w+|tests\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    options = {name for tool in (evaluate, export, generate, log) for name in tool.OPTIONS}
    for name in re.findall(r"--(\w+)=", text):
        assert name in {*FIELDS, *options, "beside", "epochs", "snapshots", "rounds", "slowrun", "steps",
                        "nproc_per_node"}, name
