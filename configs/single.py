# One model, one cosine: the demo's model, data and batch, without a population. The baseline beside
# configs/tiny.py.
# Record: 2.048 +- 0.008 nats per byte (n = 3, standard error), 2 CPU cores, half a minute each;
# results/demo.md says how.
data = "manual"
tokenizer = "bytes"
data_dir = "data/manual"
run_dir = "runs/single"
train_tokens = 32_768
fitness_tokens = 16_384
val_tokens = 24_576
epoch_multiple = 8

n_layer = 4
n_head = 4
n_embd = 128
sequence_len = 128

trajectories = 1
cycles = 1
epochs_per_cycle = 16
schedule = "cosine"
lr_scale = 0.5
batch_tokens = 1024
micro_batch = 8
distill_from = 1            # = cycles: no chain
