"""
Muon for matrices, AdamW for the rest, as one optimizer: the recipe of the Slowrun record (Muon with Polar Express,
MuonEq-R, NorMuon and cautious decay). All ranks have the reduced gradients; each keeps the moments of its share of the
matrices, steps these and sends them to the others. AdamW's part is small, and every rank does it.
"""
import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# Peak rates, before lr_scale.
MATRIX_LR, EMBEDDING_LR, UNEMBEDDING_LR, SCALAR_LR, IHA_LR = 0.04, 0.15, 0.002, 0.1, 0.02
WEIGHT_DECAY = 1.3
MOMENTUM_RISE = 0.1         # of Muon's momentum, over momentum_warmup steps
STACK = 1 << 27             # elements that Muon orthogonalises at once: half a GiB in fp32 and a few times that in between

# One triple (a, b, c) per step: X <- aX + (bA + cA^2)X with A = XX^T brings every singular value close to 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u):
    """Nearly the closest (semi-)orthogonal matrix of each of a stack (n, rows, cols): singular values of 0.8 to 1.2."""
    X = u.to(torch.bfloat16 if u.is_cuda else torch.float32)    # bf16 is slow on most CPUs
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = X.size(-2) > X.size(-1)
    for a, b, c in POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT                      # the smaller of the two Gram matrices
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.float()


def muon_direction(g, m, v, momentum, beta2):
    """
    Muon's update before rate and decay, for a stack of gradients g (n, rows, cols). The momentum m (like g) and the
    second moment v (n, rows, 1), or (n, 1, cols) where rows < cols, are updated in place.
    """
    m.lerp_(g, 1 - momentum)                                    # m = momentum * m + (1 - momentum) * g
    u = g.lerp(m, momentum)                                     # Nesterov
    u = u / u.norm(dim=-1, keepdim=True).clamp(min=1e-7)        # MuonEq-R: rows of equal size go in
    x = polar_express(u)
    # NorMuon: entries of equal size along the longer side come out, in all as large as before
    v.lerp_(x.square().mean(dim=-1 if g.size(-2) >= g.size(-1) else -2, keepdim=True), 1 - beta2)
    y = x / v.clamp(min=1e-10).sqrt()
    return y * (x.norm(dim=(-2, -1), keepdim=True) / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def make_groups(named_parameters, lr_scale):
    """
    Every parameter in exactly one group, a dict of names, params and rates; lr_scale multiplies all peak rates but that
    of the head mixes (the recipe's choice). Muon's groups hold matrices of one shape, to be stepped as one stack.
    """
    left, groups = dict(named_parameters), []

    def group(names, lr, **rates):
        if names:
            groups.append(dict(names=names, params=[left.pop(n) for n in names], lr=lr, **rates))

    def adamw(names, lr, weight_decay=0.0, betas=(0.8, 0.95)):
        group([n for n in names if n in left], lr, kind="adamw", betas=betas, eps=1e-10, weight_decay=weight_decay)

    adamw(["lm_head.weight"], UNEMBEDDING_LR * lr_scale, WEIGHT_DECAY)
    adamw(["transformer.wte.weight"], EMBEDDING_LR * lr_scale, WEIGHT_DECAY)
    adamw(["resid_lambdas", "skip_weights"], 0.01 * SCALAR_LR * lr_scale)
    adamw(["x0_lambdas"], SCALAR_LR * lr_scale, betas=(0.96, 0.95))
    adamw([n for n in left if n.endswith("_mix")], IHA_LR)
    for shape in dict.fromkeys(p.shape for p in left.values()):
        group([n for n, p in left.items() if p.shape == shape], MATRIX_LR * lr_scale,
              kind="muon", momentum=0.95, beta2=0.95, weight_decay=WEIGHT_DECAY)
    return groups


class MuonAdamW:
    """
    step() applies each group's rates times its two multipliers. The state is saved by parameter name:
    moments only, rates always come from the configuration. process_group: the ranks that share the work, None: one.
    momentum_warmup: steps over which Muon's momentum rises to its value.
    """

    def __init__(self, named_parameters, lr_scale, process_group=None, momentum_warmup=0):
        named_parameters, self.momentum_warmup = dict(named_parameters), momentum_warmup
        self.process_group, self.rank, self.size = process_group, 0, 1
        if process_group is not None:
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.groups = make_groups(named_parameters, lr_scale)
        self.steps, self.sending = 0, []
        owned = [id(p) for g in self.groups for p in g["params"]]
        assert sorted(owned) == sorted(map(id, named_parameters.values())), "each parameter in exactly one group"
        for g in self.groups:
            p, n = g["params"][0], len(g["params"][self.rank::self.size])         # of a stack every size-th is ours
            if g["kind"] == "adamw":
                g["m"] = [torch.zeros_like(p) for p in g["params"]]
                g["v"] = [torch.zeros_like(p) for p in g["params"]]
                g["steps"] = [torch.zeros((), device=p.device) for p in g["params"]]
            else:
                rows, cols = p.shape
                g["m"] = p.new_zeros(n, rows, cols)
                g["v"] = p.new_zeros((n, rows, 1) if rows >= cols else (n, 1, cols), dtype=torch.float32)

    @torch.no_grad()
    def reset(self):
        """As before the first step."""
        self.steps = 0
        for tensor in [t for g in self.groups for key in ("m", "v", "steps") for t in g.get(key, [])]:
            tensor.zero_()

    @torch.no_grad()
    def step(self, lr_multiplier, wd_multiplier):
        self.steps += 1
        for g in self.groups:
            lr, decay = g["lr"] * lr_multiplier, g["weight_decay"] * wd_multiplier
            (self.adamw if g["kind"] == "adamw" else self.muon)(g, lr, decay)
        while self.sending:
            self.sending.pop().wait()

    def adamw(self, g, lr, decay):
        """torch's own step of one group, decoupled decay."""
        adamw(g["params"], [p.grad for p in g["params"]], g["m"], g["v"], [], g["steps"],
              fused=True, amsgrad=False, maximize=False,
              beta1=g["betas"][0], beta2=g["betas"][1], lr=lr, weight_decay=decay, eps=g["eps"])

    def muon(self, g, lr, decay):
        """Step this rank's share of one group, matrices of one shape, and begin to send each to the other ranks."""
        rows, cols = g["params"][0].shape
        lr = lr * max(1, rows / cols) ** 0.5                    # tall matrices step further
        left = max(0, 1 - (self.steps - 1) / self.momentum_warmup) if self.momentum_warmup else 0
        momentum = g["momentum"] - MOMENTUM_RISE * left
        mine, at_once = g["params"][self.rank::self.size], max(1, STACK // (rows * cols))
        for part in (slice(i, i + at_once) for i in range(0, len(mine), at_once)):
            grads, weights = torch.stack([p.grad for p in mine[part]]), torch.stack(mine[part])
            updates = muon_direction(grads, g["m"][part], g["v"][part], momentum, g["beta2"])
            # cautious: decay only where the step shrinks a weight too
            weights -= lr * updates + lr * decay * weights * (updates * weights >= 0)
            torch._foreach_copy_(mine[part], weights.unbind())
        if self.size > 1:           # while the next group steps
            self.sending += [dist.broadcast(p, group=self.process_group, group_src=i % self.size, async_op=True)
                             for i, p in enumerate(g["params"])]

    def moments(self):
        """Name -> (m, v), views of what this rank keeps."""
        share = lambda g: g["names"][self.rank::self.size] if g["kind"] == "muon" else g["names"]
        return {n: (m, v) for g in self.groups for n, m, v in zip(share(g), g["m"], g["v"])}

    def state_dict(self):
        """
        The state of all ranks, gathered on rank 0 (other ranks' moments on its CPU); elsewhere without moments.
        All ranks must call it.
        """
        own, moments = self.moments(), {}
        for g in self.groups:
            for i, (name, p) in enumerate(zip(g["names"], g["params"])):
                pair = own.get(name) or (torch.empty_like(p), torch.empty(g["v"].shape[1:], device=p.device))
                if g["kind"] == "muon" and self.size > 1:
                    for t in pair:
                        dist.broadcast(t, group=self.process_group, group_src=i % self.size)
                if self.rank == 0:
                    moments[name] = pair if name in own else tuple(t.cpu() for t in pair)
        return dict(steps=self.steps, moments=moments)

    def load_state_dict(self, state):
        """Of state_dict(); every rank takes its own share. AssertionError where it is of other parameters."""
        self.steps, own = state["steps"], self.moments()
        assert {n for g in self.groups for n in g["names"]} == state["moments"].keys(), "moments of other parameters"
        for count in [count for g in self.groups for count in g.get("steps", [])]:
            count.fill_(self.steps)
        for name, moments in own.items():
            for mine, saved in zip(moments, state["moments"][name]):
                assert mine.shape == saved.shape, f"moments of another shape: {name}"
                mine.copy_(saved)
