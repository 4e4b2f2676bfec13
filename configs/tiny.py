# The demo: 2 trajectories x 16 cycles of 2 epochs on 16 KB of the Python manual, byte by byte, on a laptop.
# Text is scarce on purpose: 16 KB to train on, 16 KB to fit the prior, 24 KB to report.
# Record: 1.743 +- 0.002 nats per byte (n = 3, standard error), 2 CPU cores, 3 to 6 minutes;
# results/demo.md has it.
data = "manual"
tokenizer = "bytes"
data_dir = "data/manual"
run_dir = "runs/tiny"
train_tokens = 32_768
fitness_tokens = 16_384
val_tokens = 24_576
epoch_multiple = 8

n_layer = 4
n_head = 4
n_embd = 128
sequence_len = 128

trajectories = 2
cycles = 16
epochs_per_cycle = 2
lr_scale = 0.5
batch_tokens = 1024
micro_batch = 8
distill_from = 4
