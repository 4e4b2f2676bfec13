"""
What it takes to reproduce each published figure, and the state: python results/reproduction.py
Writes results/reproduction.md. Hours are those of tools.plan.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from infra.config import from_args          # noqa: E402
from tools import plan                      # noqa: E402

RECORD = [("1p8b_960", [])]
PAPER = [("1p8b", [])]
FIGURES = [         # (what, published, [(config, flags)] of the runs, answer to read, GPUs, state)
    ("Slowrun record 12", "2.987 (K = 256 of 480)", RECORD, "`topk`, K = 256", 40, "not yet run"),
    ("q0 at 256 epochs", "3.0034 (K = 128)", PAPER, "`learned` or `topk`, K = 128", 8, "not yet run"),
    ("fewer epochs than the baseline: best K, K = 8", "4.6x (56), 3.8x (67)", [],
     "follows from figure 2", 0, "follows from the runs below"),
    ("the prior's anatomy: K = 8, 16, 32, 64, 128",
     "topk 3.023, 3.014, 3.009, 3.004, 3.0034; lowest losses 3.055, 3.035, 3.016, 3.008, 3.006; "
     "eight kept members, fitness losses and weights", PAPER,
     "`topk`, `uniform`; `members`", 8, "not yet run"),
    ("without distillation", "3.0283", [("1p8b", ["--distill_from=64"])],
     "`topk`, K = 128", 8, "not yet run"),
    ("figure 2, q0, E = 32 .. 224, best K and K = 8", "3.079 .. 3.005; 3.082 .. 3.023",
     [("1p8b", ["--trajectories=1", f"--cycles={e // 2}"]) for e in (32, 64, 96, 128)]
     + [("1p8b", ["--trajectories=2", f"--cycles={e // 4}"]) for e in range(32, 225, 32)],
     "`topk`, best K; the better of one and two trajectories up to 128", 8, "not yet run"),
    ("the baseline, 8 x 32, and figure 2's prefixes of it", "3.0476; 3.236 .. 3.052", [("baseline", [])],
     "`uniform`, K = 8; of the first n models, `uniform`, K = n of `prior.py --trajectories=n`", 8,
     "not yet run; on the demo's text: baselines.md"),
    ("one model, 32 and 64 epochs", "3.236, 3.258",
     [("baseline", ["--trajectories=1", f"--epochs_per_cycle={e}"]) for e in (32, 64)],
     "`best`", 8, "not yet run; on the demo's text: demo.md"),
    ("figures 1 and 3, one trajectory", "3.078 (32) .. 3.019 (192)",
     [("1p8b", ["--trajectories=1", "--cycles=96"])], "`growing`", 8, "not yet run"),
    ("figures 1 and 3, two trajectories", "3.107 (32) .. 2.9983 (384)",
     [("1p8b", ["--trajectories=2", "--cycles=96"])], "`growing`", 8, "not yet run"),
    ("figures 1 and 3, three trajectories", "3.143 (32) .. 2.9916 (576)",
     [("1p8b_960", ["--trajectories=3"])], "`growing`", 24, "not yet run"),
    ("figures 1 and 3, four trajectories", "3.165 (32) .. 2.9890 (768)",
     [("1p8b_960", ["--trajectories=4"])], "`growing`", 32, "not yet run"),
    ("figures 1 and 3, five trajectories", "3.207 (32) .. 2.9868 (960)", RECORD,
     "`growing`", 40, "not yet run"),
    ("one epoch: four snapshots; one checkpoint", "3.765; 3.802", [("1p8b", ["--epochs=1"])],
     "`learned`, K = 4; the last of `members`", 8, "not yet run; on the demo's text: baselines.md"),
    ("four epochs: four snapshots; one checkpoint", "3.326; 3.365", [("1p8b", ["--epochs=4"])],
     "`learned`, K = 4; the last of `members`", 8, "not yet run; on the demo's text: baselines.md"),
    ("four epochs otherwise: 1 x 2 cycles of 2, 2 models of 2, 4 models of 1", "3.360; 3.501; 3.687",
     [("1p8b", ["--trajectories=1", "--cycles=2"]),
      ("baseline", ["--trajectories=2", "--epochs_per_cycle=2"]),
      ("baseline", ["--trajectories=4", "--epochs_per_cycle=1"])],
     "`learned`; `uniform`", 8, "not yet run; on the demo's text: baselines.md"),
    ("16 models of 16 epochs; looping from the start", "worse than 8 x 32; no better",
     [("baseline", ["--trajectories=16", "--epochs_per_cycle=16"]), ("baseline", ["--loop_from=0"])],
     "`uniform`, all", 8, "not yet run"),
    ("eight epochs: four cycles or four snapshots at the end", "they match",
     [("1p8b", ["--epochs=8"]),
      ("1p8b", ["--trajectories=1", "--cycles=4", "--first_cycle_epochs=7.25", "--epochs_per_cycle=0.25",
                "--restart=none", "--batch_tokens_ends=524288"])],
     "`learned`, K = 4", 8, "not yet run; on the demo's text: baselines.md"),
    ("data efficiency of 3.0476, 3.0034, 2.987", "9.96x, 11.96x, 12.87x", [],
     "follows from the losses and the reference's curve", 0, "follows from the runs above"),
    ("downstream: ARC-Easy, PIQA, SciQ, mean",
     ".4781 .6697 .7850 .6443 (baseline), .4865 .6823 .8030 .6573 (256), .4945 .6774 .8080 .6600 (960); "
     "data efficiency of the means 12.2x, 14.2x, 16.0x", [],
     "`python -m tools.evaluate`, by lm-evaluation-harness", 0,
     "not yet run; of a toy population: downstream.md"),
    ("Slowrun record 11, 20 models and their ensemble", "3.2030 .. 3.0876; 3.1200 .. 3.0014",
     [("record11", [])], "`members`; `uniform`, up to K = 19", 8,
     "not yet run; on the demo's text: teachers.md"),
    ("Slowrun records 6 (8 members and their ensemble), 7 to 10",
     "3.308 .. 3.200 and 3.126; 3.089, 3.081, 3.045, 3.024", [],
     "superseded by record 11", 0, "not planned"),
    ("what the script computes for given inputs", "913 quantities", [],
     "`python -m tests.parity tests/data/slowrun_facts.json`", 0,
     "measured: all within their tolerance (CPU)"),
    ("the prepared files' SHA-256", "6868ed37.., 36e7c95c..", [],
     "`python -m data.prepare configs/1p8b.py` says it", 0,
     "rehearsed on local .parquet; the hub was out of reach"),
]


LAUNCH = """\
A run is `torchrun LAUNCH train.py configs/NAME FLAGS --run_dir=...`, then `distill.py` and `prior.py` the
same way. LAUNCH is

- one GPU: `python train.py` instead of torchrun (`micro_batch` as the memory allows, 80 GB for these models;
  hours times the GPUs column);
- 8 GPUs of one node: `--standalone --nproc_per_node=8`;
- 5 nodes of 8, on each:
  `--nnodes=5 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 --rdzv_id=q0`;
- the same under SLURM: `srun --nodes=5 --ntasks-per-node=1 --gpus-per-node=8 torchrun` with these flags,
  FIRST_NODE being `$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)`.

With 5 trajectories on 5 nodes each node is one group of ranks. All ranks must see one disk (a rank that does
not see rank 0's is refused). Without one, train a trajectory on each node as a run of its own,
`--trajectories=1 --seed=42`, `--seed=43`, ..., copy the second's `trajectory_00` into the first's run
directory as `trajectory_01`, and so on (its `scores/*/00_*` as `01_*`, or they are made again), and run
`prior.py --trajectories=5 --seed=42` there. `data_dir` must be on every node (copy the files that
data.prepare wrote). Where a node's own name is that of a loopback address, set GLOO_SOCKET_IFNAME to its
network interface. Where a rank fails, its node ends; the others finish their trajectories first, or, where
that node held the rendezvous, stop and save. Then start all nodes again (SIGTERM to each torchrun makes the
rest save sooner). Launches of 8 ranks, five at once, were tried on one machine, stopped and with a rank
killed ([nodes.md](nodes.md)); more than one machine is untried.
"""


def hours(runs, gpus):
    """Hours of all runs together on so many H100s, at the 28 % of the peak of the record's own 80 h."""
    flops = 0
    for name, flags in runs:
        config, _ = from_args([str(ROOT / "configs" / f"{name}.py"), *flags], "")
        sequences = plan.sequences_per_epoch(config)
        flops += sum(plan.flops_of(config, plan.meta_model(config), sequences).values())
    return flops / (gpus * 989e12 * 0.28) / 3600


def flags_of(runs):
    rows = [f"`{' '.join([name + '.py', *flags])}`" for name, flags in runs]
    return "; ".join(rows if len(rows) <= 4 else [*rows[:2], f"... ({len(rows)} runs)", rows[-1]])


def reproduction():
    lines = ["# What it takes to reproduce the published figures", "",
             "Printed by `python results/reproduction.py`. Hours: model FLOPs by `tools.plan` at 28 % of an "
             "H100's bf16 peak, what the record's own 80 h on 40 of them come to;",
             "all three scripts. **Nothing below has been reproduced unless its state says measured.**", "",
             "The rows of figures 1 and 3 take the points of each line as prefixes of one run; the paper "
             "does not say whether they are (noise and batches depend on the cycles).", "",
             "A loss counts as reproduced within 0.002 where it is printed (repeats differ by about 0.001), "
             "within 0.003 where it was read off a figure.", "",
             "| figure | published | runs | where it is read | GPUs | hours | state |",
             "|---|---|---|---|---|---|---|"]
    for what, published, runs, answer, gpus, state in FIGURES:
        lines.append(f"| {what} | {published} | {flags_of(runs) or '-'} | {answer} | {gpus or '-'} | "
                     f"{f'{hours(runs, gpus):,.1f}' if runs else '-'} | {state} |")
    return [*lines, "", LAUNCH]


def main():
    lines = reproduction()
    (ROOT / "results" / "reproduction.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
