"""
The GPT of the NanoGPT Slowrun record: forward pass, training loss, log-probabilities.
Imports nothing of ours. Shapes: B sequences, T tokens, C = n_embd, H heads, D = C // H, V = vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    sequence_len: int               # tokens a model sees at once
    vocab_size: int                 # tokens that can be predicted; tables are padded to a multiple of 64
    n_layer: int                    # even: the first half encodes, the second decodes
    n_head: int
    n_embd: int                     # width of the residual stream
    dropout: float = 0.1            # on the output of every attention and MLP
    window_pattern: str = "SSSL"    # tiled over the layers: S sees half the sequence, L all; the last layer is L
    iha: bool = True                # interleaved heads: every head's q, k, v weights are a mix of all heads'
    mtp_weight: float = 0.3         # weight of the multi-token-prediction loss; 0 = no such head
    loop_start: int = 0             # decoder layers loop_start .. loop_end - 1 run once in order,
    loop_end: int = 0
    loop_extra: int = 0             # then so many more times as a block


def norm(x):
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)     # stays bf16 where autocast would make it fp32


def rotary(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)                         # B, T, H, D/2 each; cos, sin: T, 1, D/2
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        C, H = config.n_embd, config.n_head
        self.n_head, self.dropout, self.iha = H, config.dropout, config.iha
        if config.iha:
            self.q_mix = nn.Parameter(torch.empty(H, H))
            self.k_mix = nn.Parameter(torch.empty(H, H))
            self.v_mix = nn.Parameter(torch.empty(H, H))
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, C, bias=False)
        self.c_v = nn.Linear(C, C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.ve_gate = nn.Linear(32, H, bias=False) if has_ve else None
        self.attn_gate = nn.Linear(12, H, bias=False)

    def heads(self, x, linear, mix):
        """Project x (B, T, C) to heads (B, T, H, D), mixing the heads' weights first."""
        w = linear.weight                                               # C, C
        if mix is not None:
            w = (mix @ w.view(self.n_head, -1)).view_as(w)
        return F.linear(x, w).view(*x.shape[:2], self.n_head, -1)

    def forward(self, x, ve, rope, mask):
        mixes = (self.q_mix, self.k_mix, self.v_mix) if self.iha else (None, None, None)
        q, k, v = (self.heads(x, linear, mix) for linear, mix in zip((self.c_q, self.c_k, self.c_v), mixes))
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :32]))         # B, T, H: starts at 1, the gate's weights at 0
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(rotary(q, *rope)), norm(rotary(k, *rope))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                # B, H, T, D
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2) * torch.sigmoid(self.attn_gate(x[..., :12])).unsqueeze(-1)
        y = self.c_proj(y.flatten(2))                                   # B, T, C
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        hidden = 256 * math.ceil((8 * C // 3) / 256)
        self.c_gate = nn.Linear(C, hidden, bias=False)
        self.c_fc = nn.Linear(C, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, C, bias=False)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))          # SwiGLU
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        self.attn = Attention(config, has_ve)
        self.mlp = MLP(config)

    def forward(self, x, ve, rope, mask):
        x = x + self.attn(norm(x), ve, rope, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """
    idx and targets are (B, T) int64 with T <= sequence_len. The order of parameters() is that of the public
    script, because the noise between cycles is drawn in it; tests/parity.py holds names and order to it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        L, C = config.n_layer, config.n_embd
        padded = 64 * math.ceil(config.vocab_size / 64)
        has_ve = [i % 2 == (L - 1) % 2 for i in range(L)]               # every second layer, the last among them
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, C),
            h=nn.ModuleList(Block(config, has_ve[i]) for i in range(L)),
        ))
        self.lm_head = nn.Linear(C, padded, bias=False)
        self.ve_projs = nn.ModuleDict({str(i): nn.Linear(C, C, bias=False) for i in range(L) if has_ve[i]})
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        self.skip_weights = nn.Parameter(torch.empty(L // 2))
        if config.mtp_weight:
            self.mtp_proj = nn.Linear(2 * C, C, bias=False)
            self.mtp_block = Block(config, has_ve=False)
        # the order in which layers are applied: looped ones stand in it several times
        block = list(range(config.loop_start, config.loop_end)) * config.loop_extra
        end = config.loop_end if block else L
        self.layers = [*range(end), *block, *range(end, L)]
        self.looping = True             # False: every layer once
        self.register_tables()

    def register_tables(self):
        """Rotary angles and the mask of the short window: half the sequence to the left, plus self."""
        T, D = self.config.sequence_len, self.config.n_embd // self.config.n_head
        position = torch.arange(T)
        frequency = 10000 ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
        angle = torch.outer(position.float(), frequency)[:, None, :]                    # T, 1, D/2
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)
        distance = position[:, None] - position[None, :]
        self.register_buffer("short", (distance >= 0) & (distance <= T // 2), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        C = self.config.n_embd
        s = math.sqrt(3 / C)                            # uniform(-s, s) has standard deviation 1 / sqrt(C)
        table = (                                       # the first ending that fits
            ("wte.weight",          lambda p: p.normal_(0, 1)),
            ("lm_head.weight",      lambda p: p.normal_(0, 0.001)),
            ("c_proj.weight",       lambda p: p.normal_(0, 1 / math.sqrt(C))),
            ("ve_gate.weight",      lambda p: p.zero_()),
            ("attn_gate.weight",    lambda p: p.zero_()),
            ("_mix",                lambda p: p.copy_(torch.eye(*p.shape))),
            ("x0_lambdas",          lambda p: p.fill_(0.1)),
            ("resid_lambdas",       lambda p: p.fill_(1)),
            ("skip_weights",        lambda p: p.fill_(1)),
            ("",                    lambda p: p.uniform_(-s, s)),
        )
        for name, p in self.named_parameters():
            next(fill for ending, fill in table if name.endswith(ending))(p)
        return self

    def place(self, device, compile=False):
        """To the device in the recipe's types: on CUDA the embedding table, and so the residual stream, is bf16."""
        self.to(device)
        if device.type == "cuda":
            self.transformer.wte.bfloat16()
            if compile:             # block by block: looped layers reuse one graph, and DDP overlaps between blocks
                torch._dynamo.config.recompile_limit = 64       # training, scoring and teaching each have their kinds of block
                torch._dynamo.config.optimize_ddp = False       # would cut each block at DDP's buckets
                for block in self.modules():
                    if isinstance(block, Block):
                        block.compile()
        return self

    def hidden(self, idx):
        """The final normed hidden states, (B, T, C)."""
        c, T, half = self.config, idx.size(1), self.config.n_layer // 2
        rope = self.cos[:T], self.sin[:T]
        short = self.short[:T, :T] if T > c.sequence_len // 2 + 1 else None     # None: plain causal
        x = x0 = norm(self.transformer.wte(idx))                                # B, T, C
        ve = {int(i): proj(x0) for i, proj in self.ve_projs.items()}
        encoder = {}
        for i in self.layers if self.looping else range(c.n_layer):
            if i >= half:                                                       # U-Net: decoder i pairs with L-1-i
                x = x + self.skip_weights[i - half] * encoder[c.n_layer - 1 - i]
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            long = i == c.n_layer - 1 or c.window_pattern[i % len(c.window_pattern)] == "L"
            x = self.transformer.h[i](x, ve.get(i), rope, None if long else short)
            if i < half:
                encoder[i] = x
        return norm(x)

    def logits(self, x):
        """Capped logits in fp32 (B, T, V), without the padding of the vocabulary; x is normed."""
        z = self.lm_head(x)[..., :self.config.vocab_size].float()
        return 15 * torch.tanh(z / 15)

    def mtp_loss(self, x, targets):
        """Multi-token prediction: position t also sees token t+1 and predicts token t+2."""
        e = norm(self.transformer.wte(targets[:, :-1]))
        h = self.mtp_proj(torch.cat([x[:, :-1], e], dim=-1))                    # B, T-1, C
        T = h.size(1)
        h = self.mtp_block(h, None, (self.cos[:T], self.sin[:T]), None)
        return F.cross_entropy(self.logits(norm(h)).flatten(0, 1), targets[:, 1:].flatten())

    def forward(self, idx, targets=None):
        """
        Logits (B, T, V) float32; with targets (logits, loss): the cross-entropy, in training with the weighted
        multi-token-prediction loss, in nats, mean over tokens.
        """
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.is_cuda):
            x = self.hidden(idx)
            logits = self.logits(x)
            if targets is None:
                return logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            if self.config.mtp_weight and self.training:
                loss = loss + self.config.mtp_weight * self.mtp_loss(x, targets)
            return logits, loss

    def log_p(self, idx, targets):
        """Natural log of the probability given to each target, (B, T) float32."""
        logits = self(idx)
        return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
