"""
A member of a q0 population, its student, or the mixture of K members, for Hugging Face transformers: tools/export.py
copies this file and model.py into a folder that AutoModelForCausalLM loads with trust_remote_code=True.
"""
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT, GPTConfig


class Q0Config(PretrainedConfig):
    """gpt: the fields of GPTConfig; weights: of the members in the mixture, one 1.0 for a model alone."""
    model_type = "q0"

    def __init__(self, gpt=None, weights=(1.0,), **kwargs):
        self.gpt, self.weights = gpt, list(weights)
        super().__init__(**kwargs)


class Q0ForCausalLM(PreTrainedModel, GenerationMixin):
    """
    Float32 on a CPU; on CUDA the recipe's bf16 autocast. There is no cache of keys and values, and no padding on the
    left: every position sees all before it, padding too, so pad on the right and generate from prompts of one length.
    """
    config_class = Q0Config

    def __init__(self, config):
        super().__init__(config)
        self.members = nn.ModuleList(GPT(GPTConfig(**config.gpt)) for _ in config.weights)
        for gpt in self.members:                # transformers builds on the meta device: what is not in the file is lost
            gpt.register_buffer("cos", gpt.cos, persistent=True)
            gpt.register_buffer("sin", gpt.sin, persistent=True)
        self.post_init()

    def _init_weights(self, module):
        """All weights come from the file."""

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """
        input_ids (B, T). Logits (B, T, V) float32, of a mixture the logs of the weighted mean of its members' probabilities;
        with labels (B, T), of which -100 is ignored, the mean loss in nats per token.
        """
        T = self.config.gpt["sequence_len"]
        if input_ids.size(1) > T:
            raise ValueError(f"{input_ids.size(1)} tokens: this model sees at most {T}, cut the input")
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("padding on the left: set the tokenizer's padding_side='right'")
        members = [gpt.to_device(gpt.device) for gpt in self.members]           # in the recipe's types
        if len(members) == 1:
            logits = members[0](input_ids)
        else:
            logits = sum(w * gpt(input_ids).softmax(dim=-1) for w, gpt in zip(self.config.weights, members)).log()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("generation takes no padding: give prompts of one length")
        return {"input_ids": input_ids[:, -self.config.gpt["sequence_len"]:]}
