"""
The GPT of the NanoGPT Slowrun record: forward pass, training loss, log-probabilities. Imports nothing of
ours. Shapes: B sequences, T tokens, C = n_embd, H heads, D = C // H, V = vocab_size, N = B * T.
"""
import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl


@dataclass
class GPTConfig:
    sequence_len: int               # tokens a model sees at once
    vocab_size: int                 # tokens that can be predicted; tables are padded to a multiple of 64
    n_layer: int                    # even: the first half encodes, the second decodes
    n_head: int
    n_embd: int                     # width of the residual stream
    dropout: float = 0.1            # on the output of every attention and MLP
    window_pattern: str = "SSSL"    # tiled over the layers: S sees half the sequence, L all; the last is L
    iha: bool = True                # interleaved heads: every head's q, k, v weights are a mix of all heads'
    mtp_weight: float = 0.3         # weight of the multi-token-prediction loss; 0 = no such head
    loop_start: int = 0             # decoder layers loop_start .. loop_end - 1 run once in order,
    loop_end: int = 0
    loop_extra: int = 0             # then so many more times as a block


def norm(x):
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)     # stays bf16 where autocast would make it fp32


def rotary(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)                         # B, T, 2 (q, k), H, D/2 each; cos, sin: T, 1, 1, D/2
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1).to(x.dtype)


def mixed_precision(method):
    """bf16 autocast on CUDA, float32 elsewhere."""
    @functools.wraps(method)
    def wrapped(self, idx, *args, **kwargs):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.is_cuda):
            return method(self, idx, *args, **kwargs)
    return wrapped


def attend(q, k, v, window):
    """Causal, (B, T, H, D) each; window: how many keys to the left are seen, None: all. On CUDA no mask."""
    B, T, H, D = q.shape
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn           # here: it takes a second to import
        ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
        y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, T, T,
                        window_size=(-1 if window is None else window, 0))
        return y.view(B, T, H, D)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))                # B, H, T, D
    mask = None
    if window is not None and window < T - 1:
        distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


class Attention(nn.Module):
    """
    Causal attention in a window, on queries, keys and values of which each head mixes all heads' (IHA). In
    every second layer a gated projection of the token embedding, the value embedding ve, joins the values. As
    in the record the gates see the first channels of x only: 32 for ve, 12 for the output.
    """

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

    def weights(self, dtype):
        """q, k and v as one (3C, C), every head's weights a mix of all heads'; and c_proj's (C, C)."""
        W = torch.stack([linear.weight.to(dtype) for linear in (self.c_q, self.c_k, self.c_v)])
        W = W.view(3, self.n_head, -1)                                          # 3, H, D * C
        if self.iha:
            W = torch.stack([self.q_mix, self.k_mix, self.v_mix]).to(dtype) @ W
        return W.view(-1, self.c_q.in_features), self.c_proj.weight.to(dtype)

    def forward(self, x, weights, ve, rope, window):
        """x (B, T, C) normed; weights as weights() gives them; ve (B, T, C) or None; rope = (cos, sin)."""
        qkv, proj = weights
        qk, v = F.linear(x, qkv).view(*x.shape[:2], 3, self.n_head, -1).split([2, 1], dim=2)
        q, k, v = *norm(rotary(qk, *rope)).unbind(2), v.squeeze(2)      # B, T, H, D
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :32]))         # B, T, H: starts at 1
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        y = attend(q, k, v, window) * torch.sigmoid(self.attn_gate(x[..., :12])).unsqueeze(-1)
        y = F.linear(y.flatten(2), proj)                                # B, T, C
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        hidden = 256 * math.ceil((8 * C // 3) / 256)
        self.c_gate = nn.Linear(C, hidden, bias=False)
        self.c_fc = nn.Linear(C, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, C, bias=False)
        self.dropout = config.dropout

    def weights(self, dtype):
        return self.c_gate.weight.to(dtype), self.c_fc.weight.to(dtype), self.c_proj.weight.to(dtype)

    def forward(self, x, gate, fc, proj):
        x = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, fc), proj)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, has_ve):
        super().__init__()
        self.attn = Attention(config, has_ve)
        self.mlp = MLP(config)

    def weights(self, dtype):
        """Its matrices in the compute dtype, made once per pass however often the block is applied."""
        return *self.attn.weights(dtype), *self.mlp.weights(dtype)

    def forward(self, x, weights, ve, rope, window, mix):
        """
        (B, T, C) to (B, T, C). mix: None, or (s, e, r, a, x0) for a layer whose input is r (x + s e) + a x0:
        e is the output of the encoder layer that it pairs with (None: it is one), x0 the embedding.
        """
        qkv, proj, *mlp = weights
        if mix:
            s, e, r, a, x0 = mix
            x = r * (x if e is None else x + s * e) + a * x0
        x = x + self.attn(norm(x), (qkv, proj), ve, rope, window)
        return x + self.mlp(norm(x), *mlp)


class HeadLoss(torch.autograd.Function):
    """
    The mean over N tokens of a loss of logits, from hidden states x (N, C) and the head's weight (padded V,
    C). Loss and gradients come in one pass over chunks of tokens, so that nothing of size N x V stays alive.
    loss_of(z (n, padded V), *rows): the sum over a chunk; rows: N rows each (targets, a teacher's states),
    cut into the same chunks. They get no gradients, and backward runs once.
    """

    @staticmethod
    def forward(ctx, x, weight, loss_of, *rows):
        N, w, train = len(x), weight.to(x.dtype), any(ctx.needs_input_grad[:2])
        total, dx, dw = torch.zeros((), device=x.device), torch.empty_like(x), torch.zeros_like(weight)
        for chunk in chunks(x, len(w)):
            z = (x[chunk] @ w.T).requires_grad_(train)                  # n, padded V: aligned rows
            with torch.set_grad_enabled(train):
                loss = loss_of(z, *(row[chunk] for row in rows)) / N
            total += loss.detach()
            if train:
                dz, = torch.autograd.grad(loss, z)
                dx[chunk] = dz @ w
                if dw.dtype == dz.dtype:
                    dw.addmm_(dz.T, x[chunk])
                else:
                    dw += dz.T @ x[chunk]                               # bf16 products, their sum in float32
        ctx.gradients = dx, dw
        return total

    @staticmethod
    def backward(ctx, scale):
        (dx, dw), ctx.gradients = ctx.gradients, None                   # freed with this pass
        return dx.mul_(scale), dw.mul_(scale), *[None] * (len(ctx.needs_input_grad) - 2)


def cap(z):
    """The soft cap of logits, in float32."""
    return 15 * torch.tanh(z.float() / 15)


# of a chunk's float32 logits; glibc gives larger blocks back to the system after each use: twice the time
CHUNK_BYTES = dict(cuda=2 ** 29, cpu=2 ** 25)


def chunks(x, V):
    """Slices of the N tokens of x (N, C), short enough that the V logits of one take little memory."""
    n = max(1, CHUNK_BYTES[x.device.type] // (4 * V))
    n = n // 128 * 128 or n
    return [slice(i, i + n) for i in range(0, len(x), n)]


def cross_entropy(logits, targets):
    """Summed over tokens, in nats."""
    return F.cross_entropy(logits, targets, reduction="sum")


def capped_loss(token_loss, V, z, *rows):
    """token_loss of raw, padded logits z (n, padded V), cut to V and capped."""
    return token_loss(cap(z[:, :V]), *rows)


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
        has_ve = [i % 2 == (L - 1) % 2 for i in range(L)]               # every second layer, the last too
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, C),
            h=nn.ModuleList(Block(config, has_ve[i]) for i in range(L)),
        ))
        self.lm_head = nn.Linear(C, padded, bias=False)
        self.ve_projs = nn.ModuleDict({str(i): nn.Linear(C, C, bias=False) for i in range(L) if has_ve[i]})
        self.resid_lambdas = nn.Parameter(torch.empty(L))               # before every layer: of the stream,
        self.x0_lambdas = nn.Parameter(torch.empty(L))                  # of the embedding,
        self.skip_weights = nn.Parameter(torch.empty(L // 2))           # in the second half, of the first
        if config.mtp_weight:
            self.mtp_proj = nn.Linear(2 * C, C, bias=False)
            self.mtp_block = Block(config, has_ve=False)
        # the order in which layers are applied: looped ones stand in it several times
        block = list(range(config.loop_start, config.loop_end)) * config.loop_extra
        end = config.loop_end if block else L
        self.layers = [*range(end), *block, *range(end, L)]
        self.looping = True             # False: every layer once
        self.capped_loss = capped_loss  # to_device() may put a compiled one here
        D = C // config.n_head
        frequency = 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
        angle = torch.outer(torch.arange(config.sequence_len).float(), frequency)[:, None, None, :]
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

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

    @property
    def device(self):
        return self.cos.device

    def to_device(self, device, compile=False):
        """To the device in the recipe's types: on CUDA the embedding, and so the residual stream, is bf16."""
        self.to(device)
        if device.type == "cuda":
            self.transformer.wte.bfloat16()
            hopper = torch.cuda.get_device_capability(device)[0] == 9 and not current_flash_attention_impl()
            if hopper and importlib.util.find_spec("flash_attn_interface"):
                activate_flash_attention_impl("FA3")
            if compile:             # block by block: loops reuse one graph, DDP overlaps between blocks
                torch._dynamo.config.recompile_limit = 64       # training, scoring, teaching differ
                torch._dynamo.config.optimize_ddp = False       # would cut each block at DDP's buckets
                for block in self.modules():
                    if isinstance(block, Block):
                        block.compile(dynamic=False)
                self.capped_loss = torch.compile(capped_loss, dynamic=False)
        return self

    @mixed_precision
    def hidden(self, idx):
        """The final normed hidden states, (B, T, C)."""
        c, T, half = self.config, idx.size(1), self.config.n_layer // 2
        rope = self.cos[:T], self.sin[:T]
        x = x0 = norm(self.transformer.wte(idx))                                # B, T, C
        weights, ve, encoder = {}, {}, {}
        for i in self.layers if self.looping else range(c.n_layer):
            # once, however often it is applied; here, because gradients of what is made first come last
            if i not in weights:
                weights[i] = self.transformer.h[i].weights(x.dtype)
                ve[i] = self.ve_projs[str(i)](x0) if str(i) in self.ve_projs else None
            long = i == c.n_layer - 1 or c.window_pattern[i % len(c.window_pattern)] == "L"
            # U-Net: decoder layer i pairs with encoder layer L-1-i
            s, e = (self.skip_weights[i - half], encoder[c.n_layer - 1 - i]) if i >= half else (None, None)
            mix = s, e, self.resid_lambdas[i], self.x0_lambdas[i], x0
            x = self.transformer.h[i](x, weights[i], ve[i], rope, None if long else c.sequence_len // 2, mix)
            if i < half:
                encoder[i] = x
        return norm(x)

    def logits(self, x):
        """Capped logits in fp32 (..., V), without the padding of the vocabulary; x (..., C) is normed."""
        return cap(F.linear(x, self.lm_head.weight.to(x.dtype))[..., :self.config.vocab_size])

    def head_loss(self, x, targets, token_loss=cross_entropy, *rows):
        """
        The mean over B * T tokens, from hidden states x (B, T, C). token_loss(logits (n, V) float32, targets
        (n,), *rows: n of each) gives the sum over n tokens; each of rows here has B * T.
        """
        loss_of = functools.partial(self.capped_loss, token_loss, self.config.vocab_size)
        return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, loss_of, targets.flatten(), *rows)

    def mtp_loss(self, targets, x):
        """Multi-token prediction: position t also sees token t+1 and predicts token t+2."""
        e = norm(self.transformer.wte(targets[:, :-1]))
        h = self.mtp_proj(torch.cat([x[:, :-1], e], dim=-1))                    # B, T-1, C
        T = h.size(1)
        h = self.mtp_block(h, self.mtp_block.weights(h.dtype), None, (self.cos[:T], self.sin[:T]), None, None)
        return self.head_loss(norm(h), targets[:, 1:])

    @mixed_precision
    def forward(self, idx, targets=None, token_loss=cross_entropy, *rows):
        """
        Without targets the logits (B, T, V) float32; with them two scalars in nats: the mean of token_loss
        (see head_loss), by default the cross-entropy, and, in training, the weighted multi-token-prediction
        loss (else 0).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x)
        weight = self.config.mtp_weight if self.training else 0
        mtp = weight * self.mtp_loss(targets, x) if weight else 0
        return self.head_loss(x, targets, token_loss, *rows), mtp

    def log_p(self, idx, targets):
        """Natural log of the probability given to each target, (B, T) float32."""
        x, flat = self.hidden(idx).flatten(0, 1), targets.flatten()
        rows = [-F.cross_entropy(self.logits(x[chunk]), flat[chunk], reduction="none")
                for chunk in chunks(x, self.config.vocab_size)]
        return torch.cat(rows).view_as(targets)
