# Record 11 of the NanoGPT Slowrun, the strongest method before q0: a chain of 20 independent models on 100M
# tokens of FineWeb, each distilled from the one before. Equal weights without the first: loss 3.0014 there,
# 68 hours on 32 H100; here rule uniform, K = 19 under losses in prior.json, which leaves out the one of
# highest fitness loss. Head mixes, MTP, dropout, batch, rates and decay are the later record's.
# Not yet run here. torchrun --nproc_per_node=8 train.py configs/record11.py, then distill.py and prior.py.
data = "fineweb"
tokenizer = "gpt2"
data_dir = "data/fineweb"
run_dir = "runs/record11"
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
loop_from = 0.5

trajectories = 1
cycles = 20                 # one model each
restart = "fresh"
first_cycle_epochs = 16
epochs_per_cycle = 32
schedule = "warmdown"
momentum_warmup = 300
ema_decay = 0.95
ema_every = 10
ema_share = 0.4             # there the last weights alone where better on validation: never so here
lr_scale = 0.25
batch_tokens = 524_288
micro_batch = 2
distill_from = 1
distill_alpha = 0.7
distill_temperature = 1
compile = True
resume_every = 250
