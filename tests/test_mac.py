"""What a Mac lacks, taken away: the whole run in one process. (None was at hand: Linux without its calls.)"""
import re
import subprocess
import sys

from tests.conftest import ROOT

WITHOUT = """
import os, select, signal, sys
import datasets, matplotlib, tiktoken, torch                # what they do there is their affair
import distill, prior, train
from data import prepare
from infra import distributed
from tools import generate, plan, plot

for module, names in {
        os: "sched_getaffinity sched_setaffinity sched_getparam memfd_create eventfd posix_fadvise pipe2 "
            "getresuid posix_fallocate copy_file_range pidfd_open getrandom fdatasync setresuid splice",
        signal: "sigwaitinfo sigtimedwait SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL",
        select: "epoll"}.items():
    for name in names.split():
        vars(module).pop(name, None)
sys.platform = "darwin"

def no_proc(event, args):
    if event == "open" and str(args[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", args[0])
sys.addaudithook(no_proc)
for script in (distributed, prepare, train, distill, prior, generate, plot, plan):
    script.main(sys.argv[1:])
"""


def test_no_call_that_only_linux_has(micro, tmp_path):
    argv = micro(trajectories=1, cycles=2, distill_from=1, epochs_per_cycle=0.1)
    done = subprocess.run([sys.executable, "-c", WITHOUT, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "prior.png").exists(), done.stderr[-2000:]


def test_run_sh_is_in_the_words_of_bash_3():
    """A Mac's bash is 3.2, its tools are BSD's."""
    assert subprocess.run(["bash", "-n", ROOT / "run.sh"]).returncode == 0
    newer = (r"mapfile|readarray|coproc|(declare|local|typeset) -\w*[Agn]|\|&|&>>|\$\{!?\w+(\^|,|@\w)|"
             r"wait -n|;&|printf -v|\[\[ -v|nproc\b(?!_)|sed -i|grep -P|date -d|stat -c|mktemp -p|cp --|"
             r"readlink -m|realpath --|timeout |setsid")
    code = re.sub(r"(^|\s)#.*", "", (ROOT / "run.sh").read_text(), flags=re.M)
    assert not re.findall(newer, code)
