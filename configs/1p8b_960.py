# The Slowrun record: 5 trajectories x 96 cycles of 2 epochs on 100M tokens of FineWeb (loss 2.987 there).
# Not yet run here. torchrun over 5 nodes of 8 GPUs: train.py configs/1p8b_960.py, then distill.py, prior.py.
data = "fineweb"
tokenizer = "gpt2"
data_dir = "data/fineweb"
run_dir = "runs/1p8b_960"
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

trajectories = 5
cycles = 96
epochs_per_cycle = 2
lr_scale = 0.25
batch_tokens = 524_288      # in the middle half of the cycles
batch_tokens_ends = 393_216
micro_batch = 2
distill_from = 8
compile = True
resume_every = 250          # steps: half an hour on 8 GPUs
