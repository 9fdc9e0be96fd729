"""What the views of a record show, of made records that have every kind of part and of gap: for a comparison with a file.

    python -m tests.helpers.views > tests/record/views.json

rewrites the file; its difference to the one before is what a change does to tags, columns and values.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from align_audit.record.audit_record import SCHEMA_VERSION, Attribution, AuditRecord, Control
from align_audit.record.estimate import Estimate
from align_audit.record.run import AuditRun
from align_audit.writers.scalars import not_known, scalars
from tests.helpers.make_record import make_record, make_sites

NAN = math.nan


def cases() -> dict[str, AuditRecord]:
    """The records by name: small, so that the file can be read."""
    off = {"patching": False, "localization": False, "low_rank": False, "spinal": False}
    return {
        "healthy": make_record(100, layers=4),
        "ruined": make_record(200, layers=3, kind="destabilizing", progress=1.0),
        "before training": make_record(0, layers=3, progress=0.0),
        "one layer": make_record(50, layers=1),
        "switched off": make_record(5, layers=2, **off),  # type: ignore[arg-type]
        "finer sites": _named(make_record(100, layers=3, **off, sites=make_sites(3, 3, 1)), "helpful-v1.1"),  # type: ignore[arg-type]
        "some pairs patched": _attributed(make_record(100, layers=3, low_rank=False, spinal=False)),
        "gaps": _gaps(make_record(100, layers=3)),
    }


def _named(record: AuditRecord, name: str) -> AuditRecord:
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"probe_name": name})})


def _attributed(record: AuditRecord) -> AuditRecord:
    """The effects corrected by attribution; at layer 1 nothing varied."""
    assert record.patching is not None
    attribution = Attribution(
        exact_pairs=16,
        patched_pairs=[16, 16, 24],
        pairs=64,
        points=[0.0, 1.0],
        correlation=[0.9, NAN, 0.97],
        joint_correlation=[0.95, NAN, 0.98],
        equivalent_pairs=[40.5, NAN, 64.0],
        mean=[Estimate(mean=0.1 * layer, low=0.0, high=0.3 * layer) for layer in range(3)],
    )
    patching = record.patching.model_copy(update={"attribution": attribution, "estimator": "control_variate"})
    reasons = {
        **record.reasons,
        "patching.attribution.correlation.1": "nothing varies",
        "patching.attribution.joint_correlation": "nothing varies with the shift either",
        "patching.attribution.equivalent_pairs.1": "nothing varies",
    }
    return record.model_copy(update={"patching": patching, "reasons": reasons})


def _gaps(record: AuditRecord) -> AuditRecord:
    """Infinities, intervals without ends, and NaN in every kind of place."""
    margins, controls, spinal = record.margins, record.controls, record.spinal
    assert record.patching is not None and record.localization is not None and spinal is not None
    low_rank = {
        basis: {layer: curve.model_copy(update={"principal_angles": [0.1, NAN]}) for layer, curve in by_layer.items()}
        for basis, by_layer in record.low_rank.items()
    }
    (layer, curve), *_ = low_rank["shift"].items()
    low_rank["shift"][layer] = curve.model_copy(
        update={
            "effect_fraction": [Estimate.unknown("too few rows"), *curve.effect_fraction[1:]],
            "explained_variance_ratio": [NAN, NAN, *curve.explained_variance_ratio[2:]],
            "rank_95": NAN,
            "rank_95_low": 4.0,
            "rank_95_high": math.inf,
        }
    )
    trace = spinal.policy.model_copy(
        update={"contraction": [NAN, 0.5, 0.6], "contraction_r2": [NAN, 0.9, NAN], "transport": [0.4, NAN]}
    )
    return record.model_copy(
        update={
            "margins": margins.model_copy(
                update={
                    "kl": Estimate(mean=math.inf, low=0.1, high=math.inf),
                    "shift": Estimate(mean=1.0, low=NAN, high=NAN, reason="one pair has no interval"),
                    "entropy": Estimate(mean=NAN, low=NAN, high=NAN),
                }
            ),
            "patching": record.patching.model_copy(
                update={"peak_layer": None, "effect_p_adjusted": [NAN, 0.1, 0.2], "additivity": Estimate.unknown("no")}
            ),
            "controls": controls.model_copy(
                update={
                    "noise": Control(verdict="failed", reason="as much", effect=[Estimate.unknown("noise")] * 3),
                    "random_subspace": Control(
                        verdict="passed", reason="beats", effect=[Estimate(mean=1, low=0, high=2)] * 2, pairs=9
                    ),
                    "split_half": Control(verdict="passed", reason="halves", value=NAN),
                }
            ),
            "localization": record.localization.model_copy(
                update={"null_cv_r2": [-0.1, NAN], "selection_frequency": [NAN] * 3, "cv_r2": NAN}
            ),
            "low_rank": low_rank,
            "spinal": spinal.model_copy(update={"policy": trace, "score": NAN}),
            "reasons": {
                **record.reasons,
                "margins": "of all margins",
                "patching.peak_layer": "no layer stands out",
                "patching.effect_p_adjusted": "too few pairs",
                "localization": "the fit broke",
                f"low_rank.shift.{layer}": "a layer of few rows",
                f"low_rank.shift.{layer}.rank_95": "no rank is enough",
                "spinal.policy.contraction.0": "the window is short",
                "spinal.policy.transport": "the lens is not finite",
                "spinal": "of all of it",
            },
        }
    )


def views_of(record: AuditRecord) -> dict[str, Any]:
    """TensorBoard's curves and what it lists as not known, and both tables of a run, as plain JSON."""
    run = AuditRun(Path("run"), [record], [], [])
    wide, layers = run.to_pandas(), run.to_pandas(layers=True)
    assert wide["schema_version"].tolist() == [SCHEMA_VERSION]
    wide["schema_version"] = "newest"
    return {
        "scalars": {tag: _plain(value) for tag, value in scalars(record).items()},
        "not_known": [[path, reason, places] for (path, reason), places in not_known(record).items()],
        "to_pandas": {name: _plain(wide[name].tolist()[0]) for name in wide},
        "to_pandas_layers": {name: [_plain(value) for value in layers[name].tolist()] for name in layers},
    }


def _plain(value: Any) -> Any:
    """Six digits: the last ones are the processor's."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def as_json() -> str:
    """All views of all cases, one tag, row or column a line."""

    def lines(value: Any, depth: int) -> str:
        if depth == 3 or not value:
            return json.dumps(value, ensure_ascii=False)
        inner = ",\n".join(
            f"{json.dumps(key)}: {lines(item, depth + 1)}" if isinstance(value, dict) else lines(item, depth + 1)
            for key, item in (value.items() if isinstance(value, dict) else enumerate(value))
        )
        return f"{{\n{inner}\n}}" if isinstance(value, dict) else f"[\n{inner}\n]"

    return lines({name: views_of(record) for name, record in cases().items()}, 0)


if __name__ == "__main__":
    print(as_json())
