"""
Kills a population hundreds of times, in each phase of it: python -m tests.soak [KILLS] > results/soak.md
(240 by default: five to ten minutes on two cores; in the suite, test_survival.py has it do 20).
Each kill is a SIGKILL to every process, at a random moment of a chosen phase; then the scripts are started
again. Whenever a population is done, its members, scores, prior.json and logged steps are compared with those
of an uninterrupted one, byte by byte, and the next is begun.
"""
import collections
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from results.experiments import commit
from tests import kill


def soak(size, kills, folder):
    """(kills by phase, populations compared, names that differed) of populations on `size` ranks."""
    argv, log = [*kill.arguments(folder), "--micro_batch=1"], folder / f"log{size}"
    whole, population = kill.uninterrupted(argv, folder / f"whole{size}", size), folder / f"killed{size}"
    argv, phases, compared, differ = [*argv, f"--run_dir={population}"], collections.Counter(), 0, []
    wanted = [phase for phase in kill.PHASES for _ in range(-(-kills // len(kill.PHASES)))]
    kill.RANDOM.shuffle(wanted)
    while wanted:
        children, delay = kill.start(argv, log, size), kill.RANDOM.choice([0, 0.001, 0.003, 0.01])
        # a phase that this start still comes to: one that it does not ends in a finished population
        phase = kill.kill_in(wanted[-1], children, delay)
        if phase is not None:
            phases[phase] += 1
            if phase in wanted:
                wanted.remove(phase)
            print(f"{size} ranks: killed in '{phase}', {len(wanted)} to go", file=sys.stderr, flush=True)
            continue
        compared += 1
        differ += kill.difference(whole, population)
        shutil.rmtree(population)
    assert kill.finish(kill.start(argv, log, size)) == [0] * size, log.read_text()[-3000:]
    return phases, compared + 1, differ + kill.difference(whole, population)


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, out = sys.stderr, sys.stdout            # what data.prepare says is not part of the report
        kill.prepare(Path(folder))
        one, two = (soak(size, kills // 2, Path(folder)) for size in (1, 2))
        sys.stdout = out
    print(f"# Killed, and started again\n\nPrinted by `python -m tests.soak {kills}` at commit {commit()}; "
          f"torch {torch.__version__}, {os.cpu_count()} CPU cores ({platform.machine()}).\n{__doc__}\n"
          "| phase of rank 0 | kills, 1 process | kills, 2 processes |\n|---|---|---|")
    rows = [(phase, one[0][phase], two[0][phase]) for phase in kill.PHASES]
    rows += [("all", one[0].total(), two[0].total()), ("populations finished and compared", one[1], two[1]),
             ("files that differed or were left over", len(one[2]), len(two[2]))]
    for row in rows:
        print("| {} | {} | {} |".format(*row))
    for name in one[2] + two[2]:
        print(f"\n{name}")


if __name__ == "__main__":
    main()
