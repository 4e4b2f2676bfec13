# The paper's baseline: 8 independent models of 32 epochs each, mixed with equal weights (loss 3.048 there,
# rule uniform, K = 8). Not yet run here; results/baselines.md: on the demo's text.
# torchrun --nproc_per_node=8 train.py configs/baseline.py, then prior.py.
data = "fineweb"
tokenizer = "gpt2"
data_dir = "data/fineweb"
run_dir = "runs/baseline"
train_tokens = 100_000_000
val_tokens = 10_000_000
fitness_tokens = 132_000
epoch_multiple = 16

n_layer = 30
n_head = 16
n_embd = 2048
sequence_len = 2048
loop_start = 15
loop_end = 25
loop_extra = 4
loop_from = 0.5             # looping in the second half only: from the start it does not help this baseline

trajectories = 8            # of one cycle: independent models
cycles = 1
epochs_per_cycle = 32
schedule = "cosine"
ema_decay = 0.95            # the paper does not say how often; the record before q0 averages every 10 steps
ema_every = 10
lr_scale = 0.25
batch_tokens = 524_288
micro_batch = 2
distill_from = 1            # = cycles: no chain
compile = True
resume_every = 100          # steps: about an hour, 8 models at a time
