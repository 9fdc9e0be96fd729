"""How large is rounding noise in a layer's output, in the units that ``measures.spectrum.numerical_rank`` counts in?

    python benchmarks/evidence/rounding_noise.py                  # the shipped model: half a minute on one core
    python benchmarks/evidence/rounding_noise.py PATH_OF_A_MODEL  # any other, read on the same pairs

Residual streams of 64 pairs at their prediction positions are computed in float64, and in float32 and bfloat16. Printed per
layer, in units of eps · ‖H‖_F / √min(rows, columns) with columns scaled to one root mean square: the largest and median
singular value of the difference (the noise), the least of the rows themselves, and the rank that is counted.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_audit.lab import MODEL_DIR
from align_audit.lab.corpus import preference_pairs
from align_audit.measures.spectrum import MARGIN, numerical_rank
from align_audit.probes.pairs import ProbeSet


@torch.no_grad()
def rows(path: str, probes: ProbeSet, dtype: torch.dtype) -> torch.Tensor:
    """float64 [n, L, d]: the streams after each layer but the last, as a model of that dtype computes them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    parts = []
    for pair in probes:
        streams = model(torch.tensor([pair.chosen_ids]), output_hidden_states=True).hidden_states[1:-1]
        parts.append(torch.stack([stream[0, list(pair.chosen_predictions)].double() for stream in streams], dim=1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL_DIR))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    probes = ProbeSet.from_dataset(preference_pairs(64, 5), tokenizer, max_pairs=64)
    exact = rows(options.model, probes, torch.float64)
    print(f"counted above {MARGIN:g}")
    print(f"{'dtype':>16}{'layer':>6}{'noise: largest':>16}{'median':>8}{'signal: least':>15}{'rank':>12}")
    for dtype in (torch.float32, torch.bfloat16):
        rounded, eps = rows(options.model, probes, dtype), torch.finfo(dtype).eps
        for layer in range(exact.shape[1]):
            scale = exact[:, layer].square().mean(dim=0).sqrt()
            scaled = exact[:, layer] / scale
            unit = eps * float(scaled.norm()) / min(scaled.shape) ** 0.5
            noise = torch.linalg.svdvals((rounded[:, layer] - exact[:, layer]) / scale) / unit
            signal = torch.linalg.svdvals(scaled) / unit
            rank = f"{numerical_rank(rounded[:, layer], eps)} of {min(scaled.shape)}"
            print(
                f"{dtype!s:>16}{layer:>6}{noise[0]:>16.2f}{noise.median():>8.2f}{signal[-1]:>15.3g}{rank:>12}",
                flush=True,
            )


if __name__ == "__main__":
    main()
