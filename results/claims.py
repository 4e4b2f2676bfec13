"""
What the claims' page needs and prior.json does not hold, from the runs of results/experiments.py:
python results/claims.py FOLDER NAME=TEXT [NAME=TEXT ...]
For every run of the plans `epochs` and `ablations` in FOLDER/NAME that is not in results/claims.csv yet, it
adds rows there: what, n, and the loss in nats per token on the fitness set and on the validation set. All
choices are made on the fitness set. results/claims_page.py makes tables of them.
  first           equal weights for the first n members, in the order of training
  last            equal weights for the last n members of the last trajectory
  members         the members' mean loss, weighted as the learned mixture of all weighs them (n of them)
  kl              mean KL divergence between the members of the last half of the cycles
  documents       standard error, over documents, of the loss less that of q0_32 of the same seed
  average         one model: the mean of the weights of the last n members
  greedy          one model: the mean of members' weights, best first, of which each lowers the fitness loss
  tokens K=8, all the learned mixture, fitted on the first n tokens of the fitness set
  other K=8, all  the same, fitted on another text's fitness set: the loss on its own validation set
  abroad K=8, all fitted on its own fitness set: the loss on the other text; abroad uniform: equal weights
  at home K=8, all: fitted on the other text's fitness set: the loss on the other text
"""
import csv
import functools
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prior                                            # noqa: E402
from data import loader                                 # noqa: E402
from infra.config import from_args                      # noqa: E402
from infra.run_directory import SPLITS, RunDirectory    # noqa: E402
from results.experiments import RESULTS, arguments      # noqa: E402
from results.plans import PLANS                         # noqa: E402
from results.subsets import loss, scores                # noqa: E402

COLUMNS = "text", "variant", "seed", "what", "n", "fit_loss", "val_loss"
SOUPS, TRANSFER = ("q0_32", "noise_none", "lr_flat", "chain_none"), "q0_32"


def config_of(variant, path, source):
    return from_args(arguments(variant, path, source, f"--seed={path.name.rpartition('_')[2]}"), "")[0]


class Run:
    """A finished run: its config, data, members and their scores."""

    def __init__(self, variant, path, source):
        self.config = config_of(variant, path, source)
        self.data = loader.load(self.config)
        self.run = RunDirectory(self.config, self.data.fingerprint)
        self.members = self.run.members()
        self.scores = {split: scores(path, split) for split in SPLITS}

    @functools.cached_property
    def learned(self):
        return learned(self.scores["fit"])

    def loss(self, members, weights):
        """[fitness, validation] loss of a mixture."""
        return [loss(self.scores[split], members, weights) for split in SPLITS]

    def weights_of(self, members):
        """The mean of these members' weights: a state dict, float32."""
        states = [self.run.load_member(*self.members[i])[0] for i in members]
        return {name: sum(state[name].float() for state in states) / len(states) for name in states[0]}

    def model(self, state):
        model = prior.model_to_score(self.config)
        prior.load_weights(model, "the mean", state)
        return model.eval()

    def scored(self, state, sequences):
        """(tokens,) of these weights, float32 tensor."""
        return torch.from_numpy(loader.score(self.model(state), sequences, self.config.micro_batch))


def equal(members):
    return torch.tensor(members), torch.full((len(members),), 1 / len(members), dtype=torch.float64)


def learned(log_p):
    """{"K=8", "all": (members, weights)} fitted on these log-probabilities."""
    answers = prior.answers_for(log_p)[0]["learned"]
    return {"K=8": answers[min(8, len(answers)) - 1], "all": answers[-1]}


@torch.no_grad()
def mean_kl(run, members):
    """Mean over all ordered pairs of KL(p_i || p_j) in nats, on the first 32 validation sequences."""
    idx = torch.from_numpy(run.data.val[:32, :-1].astype(np.int64))
    logits = [run.model(run.weights_of([i]))(idx).flatten(0, 1).double() for i in members]
    log_p = torch.stack(logits).log_softmax(-1)                                         # members, tokens, V
    cross = torch.einsum("itv,jtv->ij", log_p.exp(), log_p) / log_p.size(1)             # E_i log p_j
    own = cross.diagonal()[:, None]
    return ((own - cross).sum() / (len(members) * (len(members) - 1))).item()


def diversity(run):
    members, weights = run.learned["all"]
    alone = [-(weights @ run.scores[split][members].double().mean(dim=1)).item() for split in SPLITS]
    yield "members", int((weights > 0).sum()), *alone
    late = [i for i, (_, c) in enumerate(run.members) if c >= run.config.cycles // 2]
    if len(late) > 1:
        yield "kl", len(late), "", mean_kl(run, late)


def document_error(run, base):
    """The standard error over documents of the paired difference of the two learned mixtures of all."""
    nats = []
    for one in (run, base):
        members, weights = one.learned["all"]
        of_tokens = -(weights @ one.scores["val"][members].double().exp()).log()
        nats.append(torch.bincount(torch.from_numpy(one.data.val_documents), of_tokens))
    lengths = torch.from_numpy(np.bincount(run.data.val_documents)).double()
    yield "documents", len(lengths), "", prior.paired_error(nats[0] - nats[1], lengths)


def orders(run):
    """Equal weights, in the order of training: populations of independent models, and the end of a chain."""
    for n in range(1, len(run.members) + 1):
        yield "first", n, *run.loss(*equal(list(range(n))))
    last = [i for i, (t, _) in enumerate(run.members) if t == run.members[-1][0]]
    for n in (1, 2, 4, 8, 16):
        if n <= len(last):
            yield "last", n, *run.loss(*equal(last[-n:]))


def averages(run):
    """One model instead of a mixture: the weights of several members averaged."""
    def losses(state):
        return [-run.scored(state, getattr(run.data, split)).mean().item() for split in SPLITS]
    last = range(len(run.members))
    for n in (2, 4, 8):
        yield "average", n, *losses(run.weights_of(last[-n:]))
    order = run.scores["fit"].double().mean(dim=1).argsort(descending=True).tolist()
    chosen, lowest = order[:1], -run.scores["fit"][order[0]].double().mean().item()
    for i in order[1:]:
        its = -run.scored(run.weights_of([*chosen, i]), run.data.fit).double().mean().item()
        if its < lowest:
            chosen, lowest = [*chosen, i], its
    yield "greedy", len(chosen), *losses(run.weights_of(chosen))


def fitness_tokens(run):
    total = run.scores["fit"].size(1)
    for n in (2048, 4096, 8192, total):
        for K, answer in learned(run.scores["fit"][:, :n]).items():
            yield f"tokens {K}", n, *run.loss(*answer)


def transfer(run, other):
    """Weights fitted on another text's fitness set, and what each choice gives there. other: its Data."""
    there = {split: torch.stack([run.scored(run.weights_of([i]), getattr(other, split))
                                 for i in range(len(run.members))]) for split in SPLITS}
    for K, answer in learned(there["fit"]).items():
        yield f"other {K}", len(answer[0]), *run.loss(*answer)
        yield f"at home {K}", len(answer[0]), "", loss(there["val"], *answer)
    for K, answer in run.learned.items():
        yield f"abroad {K}", len(answer[0]), "", loss(there["val"], *answer)
    everyone = equal(list(range(len(run.members))))
    yield "abroad uniform", len(run.members), "", loss(there["val"], *everyone)


def measure(folder, text, name, seed, texts):
    """All rows of one run."""
    variants = {**PLANS["epochs"][0], **PLANS["ablations"][0]}
    path = folder / text / f"{name}_{seed}"
    run = Run(variants[name], path, texts[text])
    rows = [*orders(run), *diversity(run)]
    base = path.with_name(f"q0_32_{seed}")
    if name in PLANS["ablations"][0] and name != "q0_32" and (base / "prior.json").exists():
        rows += document_error(run, Run(variants["q0_32"], base, texts[text]))
    if name in SOUPS:
        rows += averages(run)
    if name == TRANSFER:
        rows += fitness_tokens(run)
        for other, source in texts.items():
            if other != text:
                there = config_of(variants[name], folder / other / path.name, source)
                rows += transfer(run, loader.load(there))
    return [dict(zip(COLUMNS, (text, name, seed, *row))) for row in rows]


def main():
    folder, path = Path(sys.argv[1]).resolve(), RESULTS / "claims.csv"
    texts = dict(argument.split("=", 1) for argument in sys.argv[2:])
    known = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    there = {(r["text"], r["variant"], r["seed"]) for r in known}
    names = dict.fromkeys([*PLANS["epochs"][0], *PLANS["ablations"][0]])
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if not known:
            writer.writeheader()
        for about in sorted(folder.glob("*/*/about.json")):
            text, (name, _, seed) = about.parts[-3], about.parts[-2].rpartition("_")
            is_student = (about.parent / "student").exists()
            if text in texts and name in names and (text, name, seed) not in there and not is_student:
                writer.writerows(measure(folder, text, name, seed, texts))
                f.flush()
                print(text, name, seed, flush=True)


if __name__ == "__main__":
    main()
