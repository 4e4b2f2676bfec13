"""
Models for use outside this repository: python -m tools.export CONFIG --to=FOLDER [--name=value ...]
Writes the mixture of K members, one member, or the student as a folder that Hugging Face transformers loads
anywhere: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). In it: the weights in bf16
(model.safetensors), their config, model.py as it is, a modelling file, GPT-2's tokenizer and a model card.

Of its own: --to=FOLDER (new, or empty)
            --K=4 (an answer of prior.json: 1, 2, 4, ... or the number of members; 0: 4, or all of fewer)
            --member=T,C (trajectory and cycle): that model alone    --student: the student alone
            --ids: without a tokenizer, for ids alone, as where the tokenizer is bytes
"""
import dataclasses
import json
import shutil
from pathlib import Path

from data import loader
from data.tokenizer import get_tokenizer
from infra.config import from_args, student_of
from infra.console import ROOT, fail, print0, script
from infra.files import clean_up, flush_to_disk, save_tensors, write_whole
from infra.run_directory import RunDirectory, load_prior, prior_answer
from model import GPTConfig
from prior import model_to_score
from tools.generate import choose
from tools.model_card import card, error_beside, facts

OPTIONS = dict(to="", K=0, member="", student=False, ids=False)

SEPARATOR = "<|endoftext|>"
SPECIAL = "bos", "eos", "pad"               # all of them the separator


def model_files(config, weights):
    """name -> contents."""
    ids = {f"{name}_token_id": config.vocab_size - 1 for name in SPECIAL} | {"use_cache": False}
    gpt = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig)} | {"mtp_weight": 0.0}
    auto_map = dict(AutoConfig="modeling_q0.Q0Config", AutoModelForCausalLM="modeling_q0.Q0ForCausalLM")
    model = dict(
        model_type="q0", architectures=["Q0ForCausalLM"], auto_map=auto_map, gpt=gpt, weights=weights,
        dtype="float32", vocab_size=config.vocab_size, max_position_embeddings=config.sequence_len,
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        tie_word_embeddings=False, **ids)
    return {"config.json": model, "generation_config.json": ids}


def tokenizer_files(config):
    """name -> contents: data.tokenizer's ids, the separator in front. Exits with code 2 where it is bytes."""
    if config.tokenizer != "gpt2":
        fail(f"tokenizer={config.tokenizer}: transformers has none such: add --ids, to export without one")
    try:
        from tokenizers.processors import TemplateProcessing
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError as e:
        fail(f"the package '{e.name}' is missing: pip install -r '{ROOT / 'requirements-export.txt'}'")
    get_tokenizer(config.tokenizer)         # says what to do where its ranks cannot be had
    import tiktoken
    encoding = tiktoken.get_encoding("r50k_base")

    class Converter(TikTokenConverter):
        def load_tiktoken_bpe(self, _):     # the original's reads a file
            return encoding._mergeable_ranks
    tokenizer = Converter(pattern=encoding._pat_str, extra_special_tokens=[SEPARATOR]).converted()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, config.vocab_size - 1)])
    about = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.sequence_len, padding_side="right",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        split_special_tokens=True, **{f"{name}_token": SEPARATOR for name in SPECIAL})
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": about}


def tensors_of(run, members):
    """
    (name -> bf16 tensor, the parameters of one model): the members' own without the MTP head, and the rotary
    tables, which no member's file has.
    """
    tensors, model = {}, model_to_score(run.config)
    for i, member in enumerate(members):
        own = {n: w for n, w in run.load_member(*member)[0].items() if not n.startswith("mtp_")}
        own |= {name: table.clone() for name, table in model.named_buffers()}
        tensors |= {f"members.{i}.{name}": w for name, w in own.items()}
    return tensors, sum(p.numel() for p in model.parameters())


def write_folder(folder, contents, tensors):
    """All of its files; contents: name -> text, or a value to write as JSON."""
    folder.mkdir()
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    for path in ("model.py", "tools/modeling_q0.py", "LICENSE"):
        shutil.copyfile(ROOT / path, folder / Path(path).name)
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in folder.iterdir():
        flush_to_disk(path)


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    folder = Path(options.to).expanduser().resolve()
    new = not folder.exists() or folder.is_dir() and not any(folder.iterdir()) and folder != Path.cwd()
    if not options.to or not new:
        fail(f"to='{options.to}': name a folder that is new or empty, and not the one you are in, such as "
             "--to=exported")
    if sum(map(bool, (options.K, options.member, options.student))) > 1:
        fail("--K, --member and --student each say what to export: give one of them")
    data = loader.load(config)
    population = run = RunDirectory(config, data.fingerprint, only_read=True)
    whole = prior = load_prior(config.run_dir)
    if options.student:
        config, options.member = student_of(config), "0,0"
        run, prior = RunDirectory(config, data.fingerprint, only_read=True), load_prior(config.run_dir)
    label, members, weights = choose(options, prior, run)[-1]
    contents = model_files(config, weights) | ({} if options.ids else tokenizer_files(config))
    [(best, _)] = prior_answer(whole, 1, "best")
    if options.member:
        row = next(m for m in prior["members"] if (m["trajectory"], m["cycle"]) == members[0])
    else:
        K = options.K or max(a["K"] for a in prior["answers"] if a["K"] <= 4)
        row = next(a for a in prior["answers"] if (a["K"], a["rule"]) == (K, "learned"))
    if options.student:                     # its own prior knows no other
        row = row | {"val_error": error_beside((run, row), (population, best), data.val_documents)}
    tensors, parameters = tensors_of(run, members)
    each = f" in each of {len(members)} models" if len(members) > 1 else ""
    rows = {"parameters": f"{parameters:,}{each}", **facts(run, population, whole)}
    losses = {"this model": row, "the population's best member": best | {"val_error": None}}
    contents["README.md"] = card(run, prior, dict(zip(members, weights)), losses, rows, options.ids)
    clean_up(folder.parent)
    write_whole(folder, lambda temporary: write_folder(temporary, contents, tensors))
    print0(f"wrote {label} to '{options.to}': its README.md says how to load it")


if __name__ == "__main__":
    main()
