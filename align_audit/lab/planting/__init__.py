"""Policies whose truth is known, to see how often an audit finds it.

    from align_audit.lab.planting import measure_truth, plant_layers

    planted = plant_layers(base, planting_pairs, layers=[3], shift=2.0, distraction=4.0)
    truth = measure_truth(planted, base, probes)     # what restoring each layer does, by plain forwards
    record = audit(planted.policy, base, probes)     # what the audit says

Nothing in the audit imports this package, and nothing here uses a measure of the audit. ``align_audit.lab.bases``
pretrains models of several architectures to plant in; ``benchmarks/evidence/planted.py`` counts what is found.
"""

from align_audit.lab.planting.nothing import plant_nothing
from align_audit.lab.planting.placed import plant_attention, plant_head, plant_layers, plant_mlp
from align_audit.lab.planting.positions import few_prompts, plant_completion_only, plant_prompt_only
from align_audit.lab.planting.reading import margin_gradient, margins
from align_audit.lab.planting.subspace import plant_subspace
from align_audit.lab.planting.training import train_dpo
from align_audit.lab.planting.truth import (
    MeasuredTruth,
    Planted,
    Restored,
    Truth,
    measure_truth,
    patched_shift,
    restored,
)

__all__ = [
    "MeasuredTruth",
    "Planted",
    "Restored",
    "Truth",
    "few_prompts",
    "margin_gradient",
    "margins",
    "measure_truth",
    "patched_shift",
    "plant_attention",
    "plant_completion_only",
    "plant_head",
    "plant_layers",
    "plant_mlp",
    "plant_nothing",
    "plant_prompt_only",
    "plant_subspace",
    "restored",
    "train_dpo",
]
