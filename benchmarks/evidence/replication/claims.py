"""The claims of both papers, each with two criteria: as the paper states it, and as controls allow it.

AL: *Alignment is Localized* (arXiv 2510.16167). SPINAL: arXiv 2601.06238, of which we go by the abstract. Criteria and lines
were fixed before any run was judged by them; the history of this file shows it.
"""

from __future__ import annotations

from replication.claim_figures import (
    beyond_noise,
    beyond_null,
    coherence,
    coherence_at_harm,
    ends_over_middle,
    kept,
    larger_end,
    middle_over_ends,
    more_coherent,
    noise_at_peak,
    often_selected,
    reverse_at_peak,
    reversed_below,
    selected,
    slopes,
    told_in_time,
)  # fmt: skip
from replication.criteria import Claim, Criterion, healthy, no_harm, nothing_learned, uncontrolled, unpaired
from replication.figures import each_slice, gain_of_third, late_change, over_seeds, per_seed, share_of_last_third

MOST = 0.5
MINIMAL = 0.25
"""Of the shift, or of the middle layers' effect: more is not minimal."""
NEARLY_ALL = (0.95, 1.05)
"""What reproduces 99 %, to within what pairs leave uncertain."""

CLAIMS = (
    Claim(
        "middle", "AL", "The effect is concentrated in the middle layers.",
        Criterion(
            "mean effect of a layer of the middle third, less that of the larger of the other thirds, over the shift: above 0",
            middle_over_ends, above=0.0, missing=nothing_learned,
        ),
        Criterion(
            "share of the shift that the middle third adds to what lies below (layer gains): above ½; identity, reverse pass",
            lambda runs: each_slice(healthy(runs), lambda run, name: gain_of_third(run, name, 1)),
            above=MOST, missing=uncontrolled("identity", "reverse"),
        ),
    ),
    Claim(
        "ends", "AL", "Early and late layers matter little.",
        Criterion(
            "mean effect of the larger of the early and late third over that of the middle third: below ¼",
            ends_over_middle, below=MINIMAL, missing=nothing_learned,
        ),
        Criterion(
            "larger share of the shift added by the early third (with the embedding) or the late one (with the head): "
            "below ¼; identity, reverse pass",
            larger_end, below=MINIMAL, missing=uncontrolled("identity", "reverse"),
        ),
    ),
    Claim(
        "lasso", "AL", "Of all layers' distances the LASSO keeps one.",
        Criterion(
            "layers with a coefficient that is not 0, in each fit: exactly 1",
            selected, above=0.5, below=1.5, missing=nothing_learned,
        ),
        Criterion(
            "layers selected in 80 % of resamples of the pairs or more: exactly 1; permuted targets are predicted worse",
            often_selected, above=0.5, below=1.5, missing=uncontrolled("permuted_targets"),
        ),
    ),
    Claim(
        "rank", "AL", "About four singular directions reproduce 99 % of the effect.",
        Criterion(
            "share of the peak layer's effect kept by 4 directions of the policy's activations: within 0.95 to 1.05",
            kept("activation"), above=NEARLY_ALL[0], below=NEARLY_ALL[1], missing=nothing_learned,
        ),
        Criterion(
            "the same by 4 directions of the *change* of activations: above 0.95; random subspaces do worse",
            kept("shift"), above=NEARLY_ALL[0], missing=uncontrolled("random_subspace"),
        ),
    ),
    Claim(
        "noise", "AL", "Noise of the same size does not do it.",
        Criterion(
            "effect of a random shift of the same length over the real one, at the peak layer: below ¼",
            noise_at_peak, below=MINIMAL, missing=nothing_learned,
        ),
        Criterion(
            "share of the layers with an effect above 0 at which it lies above noise's, intervals apart: all",
            beyond_noise, above=0.999, missing=uncontrolled("identity"),
        ),
    ),
    Claim(
        "reverse", "AL", "Patching the other way round does the opposite.",
        Criterion(
            "effect of the reference's stream in the policy over the shift, at the peak layer: below 0",
            reverse_at_peak, below=0.0, missing=nothing_learned,
        ),
        Criterion(
            "share of the layers below the last third with an effect above 0 at which the reverse lies below 0: all "
            "(above, it is so by construction)",
            reversed_below, above=0.999, missing=uncontrolled("identity"),
        ),
    ),
    Claim(
        "contraction", "SPINAL", "Contraction ramps up in the late layers.",
        Criterion(
            "slope of the policy's contraction along the terminal block, per layer: above 0",
            slopes("contraction"), above=0.0,
        ),
        Criterion(
            "change of contraction in the terminal block less that before it, less the same of the null run: above 0",
            beyond_null(lambda record: late_change(record, "contraction")), above=0.0, missing=unpaired,
        ),
    ),
    Claim(
        "transport", "SPINAL", "Transport falls in the late layers.",
        Criterion(
            "slope of the policy's transport along the terminal block, radians per layer: below 0",
            slopes("transport"), below=0.0,
        ),
        Criterion(
            "change of transport in the terminal block less that before it, less the same of the null run: below 0",
            beyond_null(lambda record: late_change(record, "transport")), below=0.0, missing=unpaired,
        ),
    ),
    Claim(
        "late", "SPINAL", "Alignment is localized in the last third.",
        Criterion(
            "share of all change of contraction and transport that lies in the last third of the layers: above ½",
            lambda runs: over_seeds(per_seed(healthy(runs), share_of_last_third)), above=MOST,
        ),
        Criterion(
            "share of the shift that the last third and the head add to what lies below: above ½; identity and reverse pass",
            lambda runs: each_slice(healthy(runs), lambda run, name: gain_of_third(run, name, 2, ends=True)),
            above=MOST, missing=uncontrolled("identity", "reverse"),
        ),
    ),
    Claim(
        "coherence", "SPINAL", "Unaligned models are less coherent.",
        Criterion(
            "coherence of the policy less that of its reference: above 0",
            lambda runs: over_seeds(per_seed(healthy(runs), more_coherent)), above=0.0,
        ),
        Criterion(
            "coherence of the healthy run less that of the null run: above 0",
            beyond_null(coherence), above=0.0, missing=unpaired,
        ),
    ),
    Claim(
        "destabilizes", "SPINAL", "The trace says when training begins to destabilize.",
        Criterion(
            "coherence of a ruined run at the first audit that shows harm, less the healthy run's at that step: below 0",
            coherence_at_harm, below=0.0, missing=no_harm,
        ),
        Criterion(
            "share of ruined runs told of, by the first audit with harm, by a number of SPINAL that is silent in all healthy "
            "and null runs: all",
            told_in_time, above=0.999, missing=no_harm,
        ),
    ),
)  # fmt: skip
