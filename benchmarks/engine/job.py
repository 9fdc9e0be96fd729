"""The job every contender gets: a reference, a policy near it, preference pairs, and the bases of the rank sweep.

The models are randomly initialized Llamas (time does not depend on what the weights are), or a pretrained model whose folder
is named; the pairs are real where the data is present. A job is written to a folder, so that a contender can run under another
interpreter, with other versions of its libraries and nothing of ours.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from engine.contenders.common import PAIRS_PER_BATCH, Pair
from engine.contenders.hooks import Hooks

HERE = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ALIGN_AUDIT_DATA", HERE.parent / "shared" / "data"))
SPECIAL = 3
"""Token ids below this are padding, start and end."""
END = 2
RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class JobSpec:
    """What is measured on.

    Attributes:
        noise: of every weight matrix, in parts of its standard deviation.
        pairs_per_batch: of the contenders; align_audit chooses its own batches.
        model: folder of a pretrained model and its tokenizer, whose layers, width and vocabulary are then said here.
    """

    layers: int = 12
    width: int = 512
    vocab: int = 32_000
    pairs: int = 16
    max_tokens: int = 256
    dtype: str = "float32"
    noise: float = 0.05
    seed: int = 0
    ranks: tuple[int, ...] = RANKS
    device: str = "cpu"
    pairs_per_batch: int = PAIRS_PER_BATCH
    model: str | None = None

    @classmethod
    def of_model(cls, folder: Path, **options: Any) -> JobSpec:
        """On the pretrained model in a folder.

        Raises:
            SystemExit: there is none, or one that is built in another way.
        """
        config = _config(folder)
        names = {"layers": "num_hidden_layers", "width": "hidden_size", "vocab": "vocab_size"}
        missing = [key for key in names.values() if key not in config]
        if missing:
            raise SystemExit(
                f"{folder}: expected a model built as Llama is, found no {', '.join(missing)} in its config.json"
            )
        sizes = {name: config[key] for name, key in names.items()}
        return cls(**{**options, **sizes, "model": str(folder.resolve())})

    @property
    def title(self) -> str:
        """What is measured on, in words."""
        name = "Llama" if self.model is None else Path(self.model).name
        return f"{name} of {self.layers} layers, width {self.width}, vocabulary {self.vocab}"

    @property
    def clock(self) -> str:
        """Which seconds contenders are compared by: the CPU's, or those that passed until a device had finished."""
        return "CPU" if self.device == "cpu" else "wall"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def model_config(self) -> dict[str, Any]:
        """The model's own, or arguments of ``LlamaConfig``: heads of 64, and the usual 8/3 of the width between them."""
        if self.model is not None:
            return _config(Path(self.model))
        heads = max(1, self.width // 64)
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": self.width * 8 // 3,
            "max_position_embeddings": max(2048, self.max_tokens),
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": END,
        }


@dataclass
class Job:
    """A job in memory. ``bases``: [L, 2, d, K] float64, the basis that is patched on pairs of each half, or None."""

    spec: JobSpec
    reference: Any
    policy: Any
    pairs: list[Pair]
    halves: np.ndarray
    pair_source: str
    bases: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, *, weights: bool = True) -> None:
        """Weights as safetensors, the rest as JSON. Without weights, as for a pretrained model, the models are made again."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("reference", "policy") if weights and self.spec.model is None else ():
            state = {key: value.contiguous() for key, value in getattr(self, name).state_dict().items()}
            save_file(state, str(folder / f"{name}.safetensors"))
        if self.bases is not None:
            save_file({"bases": self.bases}, str(folder / "bases.safetensors"))
        content = {
            "spec": asdict(self.spec),
            "model": self.spec.model_config(),
            "pairs": [asdict(pair) for pair in self.pairs],
            "halves": self.halves.tolist(),
            "pair_source": self.pair_source,
        }
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")


def make_job(spec: JobSpec, *, with_bases: bool = False, random_tokens: bool = False) -> Job:
    """Build models and pairs; with ``with_bases`` also what the rank sweep projects on."""
    reference, policy = make_models(spec)
    pairs, source = (_random_pairs(spec), "random tokens") if random_tokens else make_pairs(spec)
    halves = split_halves(pairs, seed=0)
    job = Job(spec, reference, policy, pairs, halves, source)
    if with_bases:
        job.bases = fit_bases(reference, policy, pairs, halves, max(spec.ranks))
    return job


def load_job(folder: Path) -> Job:
    """Read what :meth:`Job.save` wrote."""
    content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    spec = JobSpec(**{**content["spec"], "ranks": tuple(content["spec"]["ranks"])})
    models: list[Any] = []
    if (folder / "policy.safetensors").exists():
        for name in ("reference", "policy"):
            model = _empty_model(content["model"], spec.torch_dtype, spec.device)
            model.load_state_dict(load_file(str(folder / f"{name}.safetensors")))
            models.append(model)
    else:
        models.extend(make_models(spec))
    stored = folder / "bases.safetensors"
    return Job(
        spec,
        models[0],
        models[1],
        [
            Pair(**{**pair, **{k: tuple(pair[k]) for k in ("prompt", "chosen", "rejected")}})
            for pair in content["pairs"]
        ],
        np.array(content["halves"], dtype=bool),
        content["pair_source"],
        load_file(str(stored))["bases"].to(spec.device) if stored.exists() else None,
    )


# -- models ----------------------------------------------------------------------------------------------------------


def make_models(spec: JobSpec) -> tuple[Any, Any]:
    """(reference, policy): the same weights, and in the policy a little noise on every matrix."""
    with torch.random.fork_rng(devices=[] if spec.device == "cpu" else [spec.device]):
        torch.manual_seed(spec.seed)
        if spec.model is not None:
            reference, policy = (_pretrained(spec.model, spec.device) for _ in range(2))
        else:
            reference, policy = (_empty_model(spec.model_config(), torch.float32, spec.device) for _ in range(2))
            policy.load_state_dict(reference.state_dict())
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.dim() > 1:
                    parameter.add_(spec.noise * parameter.std() * torch.randn_like(parameter))
    return reference.to(spec.torch_dtype), policy.to(spec.torch_dtype)


def _empty_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config))
    return model.to(dtype).eval().requires_grad_(False)


def _pretrained(folder: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def _config(folder: Path) -> dict[str, Any]:
    """What the model's ``config.json`` says.

    Raises:
        SystemExit: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SystemExit(f"{folder}: expected the folder of a pretrained model, found no config.json in it")
    return dict(json.loads(path.read_text(encoding="utf-8")))


# -- pairs -----------------------------------------------------------------------------------------------------------


def make_pairs(spec: JobSpec) -> tuple[list[Pair], str]:
    """(pairs, where from): real conversations where the data is present, else random tokens of similar lengths."""
    path = DATA / "hh-harmless" / "pairs.jsonl.gz"
    if path.exists():
        pairs = []
        for pair in _real_pairs(path, spec):
            pairs.append(pair)
            if len(pairs) == spec.pairs:
                return pairs, f"{path.parent.name}/{path.name}"
        raise ValueError(f"{path}: expected at least {spec.pairs} usable pairs, found {len(pairs)}")
    return _random_pairs(spec), "random tokens"


def tokenize(text: str, vocab: int) -> list[int]:
    """Words in pieces of at most six letters, and single marks, hashed into the vocabulary: the same everywhere."""
    pieces = re.findall(r"[^\W_]{1,6}|[^\w\s]|_", text)
    return [SPECIAL + zlib.crc32(piece.encode()) % (vocab - SPECIAL) for piece in pieces]


def _real_pairs(path: Path, spec: JobSpec) -> Iterator[Pair]:
    tokens_of, end = _tokens(spec)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for index in np.random.default_rng(spec.seed).permutation(len(records)):
        sides = [records[index][name] for name in ("chosen", "rejected")]
        cuts = [text.rindex("\n\nAssistant:") + len("\n\nAssistant:") for text in sides]
        if sides[0][: cuts[0]] != sides[1][: cuts[1]]:
            continue  # the two conversations part before the last turn
        prompt = tokens_of(sides[0][: cuts[0]])
        room = spec.max_tokens - len(prompt)
        completions = [
            tuple([*tokens_of(text[cut:]), end][: max(room, 0)]) for text, cut in zip(sides, cuts, strict=True)
        ]
        if all(completions) and completions[0] != completions[1]:
            yield Pair(tuple(prompt), *completions)


def _tokens(spec: JobSpec) -> tuple[Callable[[str], list[int]], int]:
    """What makes tokens of a text, and the one that ends a completion."""
    if spec.model is None:
        return lambda text: tokenize(text, spec.vocab), END
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id


def _random_pairs(spec: JobSpec) -> list[Pair]:
    """Lengths drawn like the real ones: prompts of a third to two thirds of the limit, shorter completions."""
    generator = np.random.default_rng(spec.seed)

    def tokens(low: float, high: float) -> tuple[int, ...]:
        count = int(generator.integers(max(2, int(low * spec.max_tokens)), max(3, int(high * spec.max_tokens))))
        return tuple(generator.integers(SPECIAL, spec.vocab, size=count).tolist())

    return [Pair(tokens(0.3, 0.6), tokens(0.05, 0.4), tokens(0.05, 0.4)) for _ in range(spec.pairs)]


# -- bases -----------------------------------------------------------------------------------------------------------


def split_halves(pairs: Sequence[Pair], seed: int) -> np.ndarray:
    """The halves align_audit cross-fits on: booleans [N]."""
    from align_audit.measures.draws import halves
    from align_audit.probes.pairs import ProbePair

    starts = [len(pair.prompt) for pair in pairs]
    probes = [ProbePair(i, *pair.sides, starts[i], starts[i]) for i, pair in enumerate(pairs)]
    return halves([probe.group for probe in probes], seed)


def fit_bases(reference: Any, policy: Any, pairs: list[Pair], halves: np.ndarray, rank: int) -> torch.Tensor:
    """[L, 2, d, K] float64: at [l, h] the top right singular vectors of the shift rows of the half that is *not* h.

    Rows are h_l(π) − h_l(ρ) at every token of the other half's pairs, not centred (METHODS §4). Their singular vectors
    are the eigenvectors of the Gram matrix, which float64 holds far more exactly than the rows themselves.
    """
    layers, width = reference.config.num_hidden_layers, reference.config.hidden_size
    with torch.no_grad():
        tool = Hooks(policy, reference)
        grams = torch.zeros(layers, 2, width, width, dtype=torch.float64, device=tool.device)
        for batch in tool.batches(pairs, 1):
            _, theirs = tool.reference_run(batch)
            valid = batch.attention_mask.bool()
            for layer, (h_policy, h_reference) in enumerate(zip(tool.policy_streams(batch), theirs, strict=True)):
                rows = (h_policy.double() - h_reference.double())[valid]
                grams[layer, int(halves[batch.index[0]])] += rows.T @ rows
    _, vectors = torch.linalg.eigh(grams)
    return vectors.flip(-1)[..., :rank].flip(1).contiguous()
