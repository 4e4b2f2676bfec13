"""
A member of a q0 population, its student, or the mixture of K members, for Hugging Face transformers.
tools/export.py copies this file and model.py into a folder that AutoModelForCausalLM loads with
trust_remote_code=True.
"""
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig


class Q0Config(PretrainedConfig):
    """gpt: the fields of GPTConfig; weights: the members' in the mixture, [1.0] for one model."""
    model_type = "q0"

    def __init__(self, gpt=None, weights=(1.0,), **kwargs):
        self.gpt, self.weights = gpt, list(weights)
        super().__init__(**kwargs)


class Q0ForCausalLM(PreTrainedModel, GenerationMixin):
    """
    Float32 on a CPU, the recipe's bf16 on CUDA. No cache of keys and values, and no padding on the left:
    every position sees all before it, padding, too.
    """
    config_class = Q0Config

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList(GPT(GPTConfig(**config.gpt)) for _ in config.weights)
        for gpt in self.members:
            # transformers builds on the meta device: tables that the file did not hold would be noise
            gpt.register_buffer("cos", gpt.cos, persistent=True)
            gpt.register_buffer("sin", gpt.sin, persistent=True)
        self.post_init()

    def _init_weights(self, module):
        """All of them come from the file."""

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """
        input_ids (B, T). Logits (B, T, V) float32, of a mixture the logs of the weighted mean of its members'
        probabilities; with labels (B, T), of which -100 is ignored, the mean loss in nats per token, too.
        """
        longest = self.config.gpt["sequence_len"]
        if input_ids.size(1) > longest:
            raise ValueError(f"{input_ids.size(1)} tokens: this model sees at most {longest}, cut the input")
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("padding on the left: set the tokenizer's padding_side='right'")
        members = [gpt.to_device(gpt.device) for gpt in self.members]       # in the recipe's types
        if len(members) == 1:
            logits = members[0](input_ids)
        else:
            weighted = zip(self.config.weights, members)
            logits = sum(w * gpt(input_ids).softmax(dim=-1) for w, gpt in weighted).log()
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        """The last sequence_len tokens, as tools/generate.py has it."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("generation takes no padding: give prompts of one length")
        return {"input_ids": input_ids[:, -self.config.gpt["sequence_len"]:]}
