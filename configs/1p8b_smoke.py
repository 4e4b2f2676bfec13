# A rehearsal of configs/1p8b.py before days of it: its model, data and batches, with 2 x 4 cycles of a
# twentieth of an epoch, through all three scripts. Its seconds a step times the plan's steps: the real time.
# Not yet run here; about half an hour on 8 GPUs: a quarter for its FLOPs (tools.plan), the rest for
# checkpoints of 15 GB.
# torchrun --standalone --nproc_per_node=8 train.py configs/1p8b_smoke.py, then distill.py and prior.py.
data = "fineweb"
tokenizer = "gpt2"
data_dir = "data/fineweb"
run_dir = "runs/1p8b_smoke"
train_tokens = 100_000_000
val_tokens = 10_000_000
fitness_tokens = 132_000
epoch_multiple = 16         # the public script's 8 GPUs x 2 sequences

n_layer = 30
n_head = 16
n_embd = 2048
sequence_len = 2048
loop_start = 15             # layers 15 .. 24 run five times: 70 layer applications
loop_end = 25
loop_extra = 4

trajectories = 2
cycles = 4
epochs_per_cycle = 0.05
lr_scale = 0.25
batch_tokens = 524_288      # in the middle half of the cycles
batch_tokens_ends = 393_216
micro_batch = 2
distill_from = 2
compile = True
resume_every = 5
