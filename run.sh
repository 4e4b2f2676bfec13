#!/usr/bin/env bash
# The one command: environment, data, the three primitives, two lines of their text, the picture.
#   ./run.sh [CONFIG] [--name=value ...]    (default configs/tiny.py; relative paths are the caller's)
#   ./run.sh test [FILE ...]                the same environment, then the tests
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
case "$root" in *:*) echo "error: '$root': PYTHONPATH cannot name a folder with a colon: move the clone" >&2; exit 2 ;; esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1    # ours from any folder, the caller's never

config="$root/configs/tiny.py"
for arg; do case "$arg" in -h|--help) sed -n 2,4p "$0"; exit ;; -*) ;; *) config= ;; esac; done
usable='import sys, importlib.metadata as m             # metadata come last: no package is half there
torch, *_ = map(m.version, "torch numpy safetensors tiktoken datasets pytest matplotlib tqdm".split())
sys.exit(sys.version_info < (3, 11) or [int(n) for n in torch.split(".")[:2]] < [2, 11])'
python=python
if ! $python -c "$usable" 2>/dev/null; then                 # not the active environment: our own
    python="$root/.venv/bin/python"
    if ! "$python" -c "$usable" 2>/dev/null; then
        for base in python3 python3.14 python3.13 python3.12 python3.11 ""; do
            [ -n "$base" ] || { echo "error: no Python 3.11 or later on the PATH: install one" >&2; exit 2; }
            "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        echo "environment: making $root/.venv" >&2
        "$base" -m venv --clear "$root/.venv"
        "$python" -m pip install -q --disable-pip-version-check -r "$root/requirements.txt"
        echo "environment: made; for commands of your own: . $root/.venv/bin/activate" >&2
    fi
fi
[ "${1-}" != test ] || { cd "$root"; [ $# -gt 1 ] || set -- test tests; exec "$python" -m pytest -q "${@:2}"; }
[ -z "$config" ] || set -- "$config" "$@"
# a cluster's, of more machines: this is one
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT ${!PET_@}
processes=$("$python" -m infra.distributed "$@")                   # checks config and run directory, exits 2 where they are wrong
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"         # threads that spin stop each other where the cores have other work
# glibc keeps what tensors free, else every step on the CPU faults it in again: a tenth of the demo's time
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
launch=("$python")
if [ "$processes" -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # torchrun passes these on, and waits so long for a checkpoint; SIGHUP is left to nohup
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
    export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGQUIT,SIGUSR1}"
    # one machine talks to itself, by no name that must be resolved (gloo, on a Mac: untried)
    [ "$(uname)" != Darwin ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo0}"
    launch=("$python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node="$processes")
fi
"$python" -m data.prepare "$@"
for script in train distill prior; do "${launch[@]}" "$root/$script.py" "$@"; done
for tool in generate plot; do "$python" -m "tools.$tool" "$@"; done
