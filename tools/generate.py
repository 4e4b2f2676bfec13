"""
Text from a population: python -m tools.generate CONFIG [--name=value ...]
Samples one continuation of a prompt from the best member and one from the mixture of K members, a line each.
A mixture asks all K members for every token and takes the weighted mean of their probabilities: K passes
instead of one.

Of its own: --prompt=TEXT  --K=4 (an answer of prior.json: 1, 2, 4, ... or the number of members;
                  0: 4, or all of fewer)
            --tokens=80  --temperature=0.8  --top_k=50 (0: no limit)  --sample_seed=0
            --member=T,C (trajectory and cycle): that model alone, instead of both
            --student: the student alone
"""
import torch

from data import loader
from data.tokenizer import get_tokenizer
from infra.config import from_args, student_of
from infra.console import fail, script
from infra.distributed import pick_device
from infra.run_directory import RunDirectory, load_prior, prior_answer
from prior import load_member, model_to_score

OPTIONS = dict(prompt="The ", K=0, tokens=80, temperature=0.8, top_k=50, sample_seed=0, member="",
               student=False)


def next_probabilities(p, temperature, top_k):
    """Probabilities (V,), sharpened (temperature < 1) and cut to the top_k largest (0: all)."""
    if temperature == 0:
        return torch.nn.functional.one_hot(p.argmax(), len(p)).double()
    p = p.double().clamp(min=1e-300).log().div(temperature).softmax(dim=0)
    if 0 < top_k < len(p):
        p = torch.zeros_like(p).index_copy(0, (top := p.topk(top_k)).indices, top.values)
    return p / p.sum()


@torch.no_grad()
def sample(models, weights, ids, options, stop):
    """
    The ids that follow `ids` (at least one, the separator's), one by one from the mixture of models with
    weights, until options.tokens of them or the id `stop`.
    """
    generator = torch.Generator().manual_seed(options.sample_seed)
    ids, start = list(ids), len(ids)
    while len(ids) < start + options.tokens:
        context = torch.tensor([ids[-models[0].config.sequence_len:]], device=models[0].device)
        p = sum(w * model(context)[0, -1].softmax(dim=0).double().cpu() for w, model in zip(weights, models))
        p = next_probabilities(p, options.temperature, options.top_k)
        ids.append(torch.multinomial(p, 1, generator=generator).item())
        if ids[-1] == stop:
            break
    return ids[start:]


def choose(options, prior, run):
    """[(label, members as (trajectory, cycle), weights)] to sample from. Exits with code 2 without them."""
    members = [(m["trajectory"], m["cycle"]) for m in prior["members"]]
    for (t, c), m in zip(members, prior["members"]):
        if run.load_member(t, c, check=False)[1]["tensors_sha256"] != m["weights_sha256"]:
            fail(f"prior.json does not match the member of trajectory {t}, cycle {c}: run prior.py on this "
                 "config again")
    if options.member:
        chosen = tuple(int(n) if n.strip().isdecimal() else -1 for n in options.member.split(","))
        if chosen not in members:
            fail(f"member={options.member}: there is no such member; write trajectory,cycle, such as "
                 f"--member={members[-1][0]},{members[-1][1]}")
        return [("student" if options.student else f"member {options.member}", [chosen], [1.0])]
    K = options.K or max(a["K"] for a in prior["answers"] if a["K"] <= 4)
    picked = []
    for rule, K in (("best", 1), ("learned", K)):
        pairs = [((m["trajectory"], m["cycle"]), w) for m, w in prior_answer(prior, K, rule)]
        label = "best member" if rule == "best" else f"mixture of {K}"
        if len(pairs) < K:
            label += f", {len(pairs)} with weight"
        passes = "1 pass" if len(pairs) == 1 else f"{len(pairs)} passes"
        picked.append((f"{label} ({passes} a token)", *zip(*pairs)))
    return picked


@script
def main(argv=None):
    config, options = from_args(argv, __doc__, **OPTIONS)
    T = options.temperature
    for name, holds, rule in (
            ("tokens", options.tokens > 0, "more than 0"),
            ("temperature", T == 0 or 1e-3 <= T < 100, "0, or between 0.001 and 100"),
            ("top_k", options.top_k >= 0, "0 or more"),
            ("sample_seed", 0 <= options.sample_seed < 2 ** 63, "0 or more, and less than 2^63")):
        if not holds:
            fail(f"{name}={getattr(options, name)}: must be {rule}")
    if any("\ud800" <= c <= "\udfff" for c in options.prompt):
        fail("prompt: is not text in UTF-8")
    if options.student:
        config, options.member = student_of(config), "0,0"
    run = RunDirectory(config, loader.load(config).fingerprint, only_read=True)
    picked = choose(options, load_prior(config.run_dir), run)
    encode, decode, _ = get_tokenizer(config.tokenizer)
    bos, device = config.vocab_size - 1, pick_device(config, 0)     # one process, whatever torchrun says
    for label, members, weights in picked:
        models = [model_to_score(config).to_device(device).eval() for _ in members]
        for model, member in zip(models, members):
            load_member(model, run, *member)
        text = decode(sample(models, weights, [bos, *encode(options.prompt)], options, stop=bos))
        print(f"{label}: {(options.prompt + text)!r}")


if __name__ == "__main__":
    main()
