"""The public Slowrun script's own step, from a clone of its repository, for tools.bench beside ours."""
import contextlib
import sys
import types
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from infra.console import fail
from model import attend

SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "window_pattern", "dropout",
         "mtp_weight")
RATES = dict(matrix_lr=0.01, scalar_lr=0.025, embedding_lr=0.04, unembedding_lr=0.0005, weight_decay=1.3,
             adam_betas=(0.8, 0.95), iha_lr=0.02)


def load(folder, honest, device):
    """
    The script as a module: what it imports and parses at import is stood in for. honest: its attention is
    ours, and, on a CPU, its Muon float32, as ours is there.
    """
    path, module = Path(folder) / "unlimited" / "train.py", types.ModuleType("slowrun")
    if not path.exists():
        fail(f"slowrun='{folder}': has no unlimited/train.py; name a clone of the Slowrun's repository")
    source = path.read_text()
    if honest and device.type == "cpu":
        source = source.replace("X = g.bfloat16()", "X = g.float()")
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    sys.modules["slowrun"], module.__file__ = module, str(path)
    with patch.object(sys, "argv", [str(path)]), patch.object(sys, "path", [str(path.parent), *sys.path]):
        exec(compile(source, str(path), "exec"), vars(module))
    if honest:
        module.flash_attn.flash_attn_func = lambda q, k, v, causal, window_size: attend(
            q, k, v, window_size[0] if 0 <= window_size[0] < q.size(1) else None)
    return module


class Theirs:
    """Its model and optimizer, stepped as its loop steps them, on labels or against a teacher."""

    def __init__(self, folder, honest, device, config, chain):
        script, fast = load(folder, honest, device), config.compile and device.type == "cuda"
        shape = script.GPTConfig(**{name: getattr(config, name) for name in SHAPE},
                                 n_kv_head=config.n_head, use_iha=config.iha)

        def build():
            model = script.GPT(shape).to(device)
            model.init_weights()
            if config.loop_extra:
                model.set_dupe_layers(config.loop_start, config.loop_end)
            return model

        self.config, self.model, self.teacher = config, build(), None
        self.forward = torch.compile(self.model, dynamic=False) if fast else self.model
        self.optimizer = self.model.setup_optimizer(RATES)
        if chain:
            teacher = build().eval().requires_grad_(False)
            teacher = teacher.bfloat16() if device.type == "cuda" else teacher
            self.teacher = teacher.forward_logits
            if fast:
                self.teacher = torch.compile(self.teacher, dynamic=False)
        plain = honest and device.type == "cpu"
        self.autocast = contextlib.nullcontext() if plain else torch.autocast(device.type, torch.bfloat16)

    def loss(self, batch):
        x, y, c, T = (batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), self.config,
                      self.config.distill_temperature)
        if not self.teacher:
            with self.autocast:
                return self.forward(x, y)
        with self.autocast:
            student, mtp = self.forward(x, y, distill=True)
            with torch.no_grad():
                teacher = self.teacher(x)
        student, teacher = student.flatten(0, 1).float(), teacher.flatten(0, 1).float()
        student_log_p, teacher_log_p = F.log_softmax(student / T, dim=-1), F.log_softmax(teacher / T, dim=-1)
        kl = F.kl_div(student_log_p, teacher_log_p, reduction="batchmean", log_target=True) * T ** 2
        labels = F.cross_entropy(student, y.flatten()) + c.mtp_weight * mtp
        return (1 - c.distill_alpha) * labels + c.distill_alpha * kl

    def step(self, micro_batches):
        for batch in micro_batches:
            (self.loss(batch) / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def state_made_by_steps(self):
        """Bytes: the optimizer makes its state with its first step."""
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values()
                   if torch.is_tensor(t))
