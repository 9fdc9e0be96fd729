"""Records as curves: a tag and a value for each number that is drawn over steps, and a list of those that are not known.

Tags are ``align_audit/<group>/<name>``, named after the fields of the record, and those of a named probe set
``align_audit/<probe name>/<group>/<name>``:

- ``margins/<name>``, ``spinal/<name>``, ``cost/<name>``, ``localization/<name>``: single numbers;
- ``patching/<name>``, and by layer ``patching/<name>/layer_07`` (``effect``, ``recovery``, ``layer_gain``,
  ``block_transplant``, ``effect_p_adjusted``, and where only some pairs were patched ``attribution/correlation``,
  ``attribution/joint_correlation``, ``attribution/patched_pairs`` and ``attribution/equivalent_pairs``);
- ``controls/<name>/passed`` (1 or 0; nothing where the control was not run), ``controls/<name>/effect/layer_07``
  (``…/rank_08`` for ``random_subspace``), ``controls/split_half/value``;
- ``localization/<name>/layer_07`` (``lasso_coefficients``, ``selection_frequency``, ``null_selection_frequency``),
  ``localization/selected_layers`` (how many) and ``localization/null_cv_r2_max``;
- ``low_rank/<basis>/layer_07/<name>`` (``rank_95``, ``full_effect``, ``largest_principal_angle``) and
  ``…/effect_fraction/rank_08``, ``…/explained_variance_ratio/rank_08``;
- ``sites/<site>/layer_07``, of single heads ``sites/head/layer_07_head_03`` (sufficiency), the same below
  ``sites/<site>/necessity`` and, beside an attribution, ``sites/<site>/correlation``; a site that was patched at other
  positions, in windows or by another estimator says so (``sites/block_width_2``, ``sites/head_prompt_attribution``);
- ``spinal/<policy or reference>/<contraction, contraction_r2 or transport>/layer_07``;
- ``alerts/<level>``: how many.

An estimate stands under its name, the ends of its interval beside it (``shift``, ``shift_low``, ``shift_high``); by layer
or rank only its mean does, and the pictures show the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from align_audit.record.audit_record import IN_TRAINING, AuditRecord, Margins, control_items
from align_audit.record.numbers import NO_REASON, Number, by_series
from align_audit.record.site_names import site_names

ROOT = "align_audit"

_PATCHING = (
    "embedding_gain", "head_gain", "embedding_transplant", "head_transplant", "additivity", "peak_layer",
    "attribution.correlation", "attribution.joint_correlation", "attribution.patched_pairs", "attribution.equivalent_pairs",
    "effect", "recovery", "layer_gain", "block_transplant", "effect_p_adjusted",
)  # fmt: skip
_LOCALIZATION = ("lasso_lambda", "cv_r2", "center_of_mass", "entropy")
_LOCALIZATION_BY_LAYER = ("lasso_coefficients", "selection_frequency", "null_selection_frequency")
_SPINAL = ("delta_align", "coherence", "reference_coherence", "score", "gradient_concentration")
_TRACE = ("contraction", "contraction_r2", "transport")
_COST = ("seconds", "peak_memory", "forward_equivalents")


def scalars(record: AuditRecord) -> dict[str, float]:
    """Tag → value of everything that is drawn and is one finite number. See the module's docstring for the tags."""
    root = root_of(record.provenance.probe_name)
    return {f"{root}/{point.tag}": point.value for point in _Points(record).all() if math.isfinite(point.value)}


def root_of(probe_name: str | None) -> str:
    """What the tags of a probe set begin with."""
    return ROOT if probe_name is None else f"{ROOT}/{probe_name}"


def not_known(record: AuditRecord) -> dict[tuple[str, str], list[int]]:
    """What is missing among the scalars: (path in the record, reason) → the layers, ranks or units concerned, if any."""
    missing: dict[tuple[str, str], list[int]] = {}
    for point in _Points(record).all():
        if math.isfinite(point.value):
            continue
        infinite = f"the value is {point.value}" if math.isinf(point.value) else NO_REASON
        places = missing.setdefault((point.path, point.reason or infinite), [])
        if point.index is not None and point.index not in places:
            places.append(point.index)
    # Parts that were not measured have reasons, but no numbers.
    listed = {path for path, _ in missing}
    for path, reason in record.reasons.items():
        if path in IN_TRAINING:  # what an audit costs is nothing about the models
            continue
        if not any(path == part or path.startswith(f"{part}.") for part in listed):
            missing.setdefault((path, reason), [])
    return missing


@dataclass(frozen=True)
class _Point:
    """One point of a curve: its tag below the root, its value, and of what in the record it is."""

    tag: str
    value: float
    path: str
    """Of the number, or of the sequence that it belongs to."""
    index: int | None = None
    reason: str | None = None

    @classmethod
    def of(cls, tag: str, number: Number, value: float | None) -> _Point:
        return cls(tag, math.nan if value is None else float(value), number.series, number.index, number.reason)


class _Points:
    """What is drawn of a record, in the order of the record's parts."""

    def __init__(self, record: AuditRecord) -> None:
        self.record = record
        self.series = by_series(record)

    def all(self) -> Iterator[_Point]:
        yield from self._part("margins", *Margins.model_fields)
        yield from self._part("patching", *_PATCHING)
        yield from self._controls()
        yield from self._localization()
        yield from self._low_rank()
        yield from self._sites()
        yield from self._part("spinal", *_SPINAL)
        yield from self._part("spinal.policy", *_TRACE)
        yield from self._part("spinal.reference", *_TRACE)
        for level in ("info", "warning", "error"):
            count = sum(alert.level == level and alert.event != "resolved" for alert in self.record.alerts)
            yield _Point(f"alerts/{level}", float(count), "alerts")
        yield from self._part("cost", *_COST)

    def _part(self, path: str, *names: str) -> Iterator[_Point]:
        """Fields of a part, under their own names."""
        for name in names:
            numbers = self.series.get(f"{path}.{name}", [])
            highest = max((number.index or 0 for number in numbers), default=0)
            for number in numbers:
                # A part of the path that is a number is the layer of a low-rank curve.
                parts = [self._layer(part) if part.isdecimal() else part for part in number.series.split(".")]
                if number.index is not None:
                    parts.append(
                        self._layer(number.index) if number.index_kind == "layer" else _rank(number.index, highest)
                    )
                yield from self._points("/".join(parts), number)

    def _points(self, tag: str, number: Number) -> Iterator[_Point]:
        yield _Point.of(tag, number, number.value)
        if number.low is not None and number.index is None:
            # One of a row of layers or ranks shows its interval in the pictures: three curves each would bury the rest.
            yield _Point.of(f"{tag}_low", number, number.low)
            yield _Point.of(f"{tag}_high", number, number.high)

    def _controls(self) -> Iterator[_Point]:
        for name, control in control_items(self.record):
            path = f"controls.{name}"
            if control.verdict != "not_run":
                yield _Point(f"controls/{name}/passed", float(control.verdict == "passed"), f"{path}.verdict")
            if control.value is not None:
                yield from self._part(path, "value")
            if name != "identity":  # exactly 0 wherever it passed
                yield from self._part(path, "effect")

    def _localization(self) -> Iterator[_Point]:
        yield from self._part("localization", *_LOCALIZATION)
        if (localization := self.record.localization) is not None:
            path = "localization.selected_layers"
            yield _Point("localization/selected_layers", float(len(localization.selected_layers)), path)
        yield from self._largest("localization.null_cv_r2", "localization/null_cv_r2_max")
        yield from self._part("localization", *_LOCALIZATION_BY_LAYER)

    def _low_rank(self) -> Iterator[_Point]:
        for basis, curves in self.record.low_rank.items():
            for layer in curves:
                path = f"low_rank.{basis}.{layer}"
                yield from self._part(path, "rank_95", "full_effect")
                yield from self._largest(
                    f"{path}.principal_angles", f"low_rank/{basis}/{self._layer(layer)}/largest_principal_angle"
                )
                by_rank = self._part(path, "effect_fraction", "explained_variance_ratio")
                yield from sorted(by_rank, key=lambda point: point.index or 0)

    def _sites(self) -> Iterator[_Point]:
        for place, (name, curve) in enumerate(zip(site_names(self.record.sites), self.record.sites, strict=True)):
            directions = {
                f"sites/{name}{below}": numbers
                for below, field in (("", "sufficiency"), ("/necessity", "necessity"), ("/correlation", "correlation"))
                if (numbers := self.series.get(f"sites.{place}.{field}"))
            }
            last = max((unit.head or 0 for unit in curve.units), default=0)
            for at, unit in enumerate(curve.units):
                head = "" if unit.head is None else f"_head_{unit.head:0{_width(last)}d}"
                for tag, numbers in directions.items():
                    yield from self._points(f"{tag}/{self._layer(unit.layer)}{head}", numbers[at])

    def _largest(self, path: str, tag: str) -> Iterator[_Point]:
        points = [_Point.of(tag, number, number.value) for number in self.series.get(path, [])]
        if points:
            yield replace(max(points, key=lambda point: point.value), index=None)

    def _layer(self, layer: int | str) -> str:
        return f"layer_{int(layer):0{_width(self.record.provenance.num_layers - 1)}d}"


def _rank(rank: int, highest: int) -> str:
    return f"rank_{rank:0{_width(highest)}d}"


def _width(largest: int) -> int:
    # Padded, so that the sorting of tags is the order of layers.
    return max(2, len(str(largest)))
