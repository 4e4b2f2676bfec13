# GPT-2 small's shape (174M parameters with the recipe's untied head, value embeddings and MTP) on one GPU of
# 24 GB: 1 trajectory x 6 cycles of 2 epochs on 10M tokens of FineWeb. Not yet run here.
# ./run.sh configs/124m.py does it all, in 45 minutes (an RTX 4090 at 35 % of its peak, a guess: an H200
# reached 23 % of its own) by
# python -m tools.plan configs/124m.py --ranks=1 --peak_tflops=165 --mfu=0.35 --gpu_gb=24
data = "fineweb"
tokenizer = "gpt2"
data_dir = "data/fineweb_10m"
run_dir = "runs/124m"
train_tokens = 10_000_000
val_tokens = 1_000_000
fitness_tokens = 132_000
epoch_multiple = 16

n_layer = 12
n_head = 6                  # heads of 128, as in the record
n_embd = 768
sequence_len = 1024

trajectories = 1
cycles = 6
epochs_per_cycle = 2
lr_scale = 0.5
batch_tokens = 65_536
micro_batch = 4             # where there are 12 GB 16 keeps the GPU busier
distill_from = 2
compile = True
