"""AntiBERTy under other attentions: how many masked residues of antibody chains it names right.

The chains are translated from the genes of the data set `antibodies`: human, against HIV, heavily mutated. They fall
into families by the words of three residues that they share; one chain of each of some families is measured, and what
trains on comes from the other families alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from clearhead.data import catalogue
from clearhead.data.sequences import read_fasta, read_flat
from experiments.adopt_encoders.under import OWN, opened, tokenizer, under

FILES = {"heavy": "test_hiv_bnab_hcs.fasta", "light": "test_hiv_bnab_lcs.fasta"}
KIN = 0.5
"""Two chains that share more than this of the shorter one's words are of one family."""
FOLD = 8
"""Every residue is masked once, one in eight at a time: near the share that BERT trains with."""
_BASES = "TCAG"
_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_CODE = {a + b + c: _ACIDS[16 * i + 4 * j + k] for i, a in enumerate(_BASES) for j, b in enumerate(_BASES)
         for k, c in enumerate(_BASES)}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One attention, on held-out chains of each kind."""

    attention: str
    chains: int
    source: str = "antibodies"


@dataclass(frozen=True)
class Recovery:
    """Some steps of training under an attention, from the pretrained weights."""

    attention: str
    seed: int
    steps: int
    looks: tuple[int, ...]
    chains: int
    batch: int = 4
    rate: float = 1e-4


def translate(gene: str) -> str:
    """The longest stretch without a stop, over the three frames."""
    frames = ("".join(_CODE.get(gene[i : i + 3], "X") for i in range(first, len(gene) - 2, 3)) for first in range(3))
    return max((stretch for frame in frames for stretch in frame.split("*")), key=len)


@lru_cache(maxsize=1)
def families() -> dict[str, list[list[str]]]:
    """Kind of chain -> families of distinct chains, in the file's order."""
    answer = {}
    for kind, name in FILES.items():
        data = (catalogue.path("antibodies") / name).read_bytes()
        chains = dict.fromkeys(translate(gene.decode()) for _, gene in read_fasta(data, name, dna=True))
        answer[kind] = group([chain for chain in chains if "X" not in chain])
    return answer


def group(chains: list[str]) -> list[list[str]]:
    """Families by single linkage."""
    words = [{chain[i : i + 3] for i in range(len(chain) - 2)} for chain in chains]
    head = list(range(len(chains)))

    def root(i: int) -> int:
        while head[i] != i:
            i = head[i]
        return i

    for i in range(len(chains)):
        for j in range(i):
            if len(words[i] & words[j]) > KIN * min(len(words[i]), len(words[j])):
                head[root(i)] = root(j)
    found: dict[int, list[str]] = defaultdict(list)
    for i, chain in enumerate(chains):
        found[root(i)].append(chain)
    return list(found.values())


def held_out(count: int) -> list[str]:
    """One chain of each of `count` families of heavy chains, and of light ones."""
    chosen = []
    for kind, kin in families().items():
        draw = random.Random(f"families of {kind} chains")
        chosen += [draw.choice(family) for family in draw.sample(kin, count)]
    return chosen


def others(count: int) -> list[str]:
    """The chains of all families that `held_out` did not touch."""
    taken = set(held_out(count))
    return [chain for kin in families().values() for family in kin if not taken & set(family) for chain in family]


def general(count: int) -> list[str]:
    """Proteins that are no antibodies, of 80 to 200 residues of the twenty kinds."""
    data = next((catalogue.path("proteins") / "usr/share/EMBOSS/test/swiss").glob("seq.dat")).read_bytes()
    fit = [letters.decode() for _, letters in read_flat(data, "proteins", dna=False) if 80 <= len(letters) <= 200]
    fit = [protein for protein in fit if not set(protein) & set("BJOUXZ")]
    return random.Random(0).sample(fit, min(count, len(fit)))


@lru_cache(maxsize=1)
def reader() -> Any:
    """The tokenizer."""
    return tokenizer("antiberty")


@lru_cache(maxsize=1)
def pretrained() -> Any:
    """The model, never trained here."""
    return opened("antiberty")


@torch.no_grad()
def score(model: Any, chain: str) -> dict[str, float]:
    """Residues named right, of how many, and nats, each residue masked once."""
    ids_t = reader()(" ".join(chain), return_tensors="pt").input_ids[0]
    place_t = torch.arange(len(ids_t))
    masked_bt = torch.stack([(place_t % FOLD == b) & (place_t > 0) & (place_t <= len(chain)) for b in range(FOLD)])
    inputs_bt = ids_t.expand(FOLD, -1).masked_fill(masked_bt, reader().mask_token_id)
    logits_nV = model(inputs_bt).logits[masked_bt]
    targets_n = ids_t.expand(FOLD, -1)[masked_bt]
    right = int((logits_nV.argmax(-1) == targets_n).sum())
    nats = float(nnf.cross_entropy(logits_nV, targets_n, reduction="sum"))
    return {"right": right, "of": len(targets_n), "nats": nats}


def measure(job: Job) -> dict[str, Any]:
    """Every chain under one attention."""
    torch.set_num_threads(1)
    chains = held_out(job.chains) if job.source == "antibodies" else general(job.chains)
    with under(pretrained(), job.attention) as model:
        found = [score(model, chain) for chain in chains]
    common = {"most_common": most_common(chains)} if job.attention == OWN else {}
    return {"source": job.source, "chains": found} | common


def most_common(chains: list[str]) -> float:
    """Share of residues that are the most common one: what knows nothing gets right."""
    letters = "".join(chains)
    return max(letters.count(letter) for letter in set(letters)) / len(letters)


def recover(job: Recovery) -> dict[str, Any]:
    """Train under an attention with BERT's objective on the other families' chains; look now and then."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    chains, measured = others(job.chains), held_out(job.chains)
    model = opened("antiberty")
    draw = torch.Generator().manual_seed(job.seed)
    looks = {}
    with under(model, job.attention):
        optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.0)
        for step in range(job.steps + 1):
            if step in job.looks:
                model.eval()
                looks[str(step)] = [score(model, chain) for chain in measured]
            if step == job.steps:
                break
            optimizer.param_groups[0]["lr"] = job.rate * min(1.0, (step + 1) / 10)
            picked = torch.randint(len(chains), (job.batch,), generator=draw).tolist()
            model.train()
            loss = masked_loss(model, [chains[i] for i in picked], draw)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return {
        "seed": job.seed,
        "steps": job.steps,
        "trained_on": len(chains),
        "looks": looks,
    }


def masked_loss(model: Any, chains: list[str], draw: torch.Generator) -> Tensor:
    """Cross-entropy at the masked places: 15 % of the residues, all of them as [MASK]."""
    inputs = reader()([" ".join(chain) for chain in chains], padding=True, return_tensors="pt")
    ids_bt, seen_bt = inputs.input_ids, inputs.attention_mask
    residue_bt = ids_bt > reader().mask_token_id
    masked_bt = residue_bt & (torch.rand(ids_bt.shape, generator=draw) < 0.15)
    if not masked_bt.any():
        masked_bt = residue_bt
    logits_btV = model(ids_bt.masked_fill(masked_bt, reader().mask_token_id), attention_mask=seen_bt).logits
    return nnf.cross_entropy(logits_btV[masked_bt], ids_bt[masked_bt])
