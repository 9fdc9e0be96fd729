"""Records as TensorBoard curves, pictures and text.

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
TensorBoard cannot draw NaN: what is not known is left out and listed, with its reason, in the text
``align_audit/not_known``. Other texts are ``align_audit/alerts`` and ``align_audit/controls``; the pictures of
:mod:`align_audit.writers.plots.gallery` stand under ``align_audit/<group>/<function>``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_audit.record.audit_record import (
    Alert,
    AuditRecord,
    Estimate,
    LowRankCurve,
    Margins,
    SiteCurve,
    control_items,
    site_names,
)
from align_audit.record.numbers import is_unknown, span, why_unknown
from align_audit.record.run import one_per_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

ROOT = "align_audit"


class TensorBoardWriter:
    """Writes audits with a summary writer that belongs to somebody else: it is flushed, never closed.

    Args:
        summary_writer: any ``torch.utils.tensorboard.SummaryWriter``; the trainer's own, for curves side by side.
        images: draw heat maps and traces too (a few seconds an audit).
        probe_names: of all sets that will be written; TensorBoard reads one layout, which has to name them all.
    """

    def __init__(
        self, summary_writer: SummaryWriter, images: bool = True, probe_names: Sequence[str | None] = (None,)
    ) -> None:
        self._writer = summary_writer
        self._images = images
        self._probe_names = tuple(probe_names)
        self._layout_written = False

    def redirect(self, summary_writer: SummaryWriter) -> None:
        """Go on with another writer of the same log folder, because the first was closed."""
        self._writer = summary_writer

    def write(self, record: AuditRecord, history: Sequence[AuditRecord] = ()) -> None:
        """Write one audit at its step.

        Args:
            record: the audit.
            history: the audits of the run, for the pictures over steps; ``record`` may be among them or not, and those
                of other probe sets are left out.
        """
        step, name = record.step, record.provenance.probe_name
        root = _root(name)
        try:
            if not self._layout_written:
                self._writer.add_custom_scalars(custom_scalars_layout(self._probe_names, record.sites))
                self._layout_written = True
            for tag, value in scalars(record).items():
                self._writer.add_scalar(tag, value, step)
            self._writer.add_text(f"{root}/controls", controls_table(record), step)
            if record.alerts:
                self._writer.add_text(f"{root}/alerts", "\n\n".join(map(alert_text, record.alerts)), step)
            unknown = not_known(record)
            if unknown:
                self._writer.add_text(f"{root}/not_known", not_known_table(record), step)
            if self._images:
                others = [other for other in history if other.key != record.key and other.provenance.probe_name == name]
                self._write_images(record, [*others, record])
        finally:
            self._writer.flush()

    def _write_images(self, record: AuditRecord, records: Sequence[AuditRecord]) -> None:
        from align_audit.writers.plots import gallery as plots
        from align_audit.writers.plots.canvas import pixels
        from align_audit.writers.plots.sites import site_figures

        # Later audits may be in the log when an earlier step is written again; a picture at a step shows none of them.
        records = [other for other in one_per_step(records) if other.step <= record.step]
        figures: dict[str, tuple[bool, Callable[[], Figure]]] = {
            "margins/margins_over_steps": (True, lambda: plots.margins_over_steps(records)),
            "patching/recovery_by_layer_and_step": (
                record.patching is not None,
                lambda: plots.recovery_by_layer_and_step(records),
            ),
            "patching/layer_gain_by_layer_and_step": (
                record.patching is not None,
                lambda: plots.layer_gain_by_layer_and_step(records),
            ),
            "patching/block_transplants": (record.patching is not None, lambda: plots.block_transplants(records)),
            "low_rank/low_rank_curve": (bool(record.low_rank), lambda: plots.low_rank_curve(record)),
            "spinal/depth_trace": (record.spinal is not None, lambda: plots.depth_trace(record)),
        }
        figures |= {f"sites/{name}": (True, draw) for name, draw in site_figures(record).items()}
        for tag, (measured, draw) in figures.items():
            if measured:
                # add_figure would go through pyplot, and its global state.
                self._writer.add_image(
                    f"{_root(record.provenance.probe_name)}/{tag}", pixels(draw()), record.step, dataformats="HWC"
                )


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """One number of a record: its tag below the root, its value, and its path in the record."""

    tag: str
    value: float
    path: str
    index: int | None = None
    """Layer or rank, where it is one of many."""
    reason: str | None = None


def scalars(record: AuditRecord) -> dict[str, float]:
    """Tag → value of everything in a record that is one finite number. See the module's docstring for the tags."""
    root = _root(record.provenance.probe_name)
    return {f"{root}/{number.tag}": number.value for number in _numbers(record) if math.isfinite(number.value)}


def _root(probe_name: str | None) -> str:
    return ROOT if probe_name is None else f"{ROOT}/{probe_name}"


def not_known(record: AuditRecord) -> dict[tuple[str, str], list[int]]:
    """What is missing among the scalars: (path in the record, reason) → the layers or ranks concerned, if any."""
    found: dict[tuple[str, str], list[int]] = {}
    for number in _numbers(record):
        if not math.isfinite(number.value):
            path = number.path if number.index is None else f"{number.path}.{number.index}"
            # R² and its slope are NaN together, and the reason stands with the slope.
            path = path.replace(".contraction_r2.", ".contraction.")
            reason = number.reason or (
                why_unknown(record, path) if math.isnan(number.value) else f"the value is {number.value}"
            )
            places = found.setdefault((number.path, reason), [])
            if number.index is not None and number.index not in places:
                places.append(number.index)
    # Parts that were not measured have reasons, but no numbers.
    said = {path for path, _ in found}
    for path, reason in record.reasons.items():
        if not any(path == other or path.startswith(f"{other}.") for other in said):
            found.setdefault((path, reason), [])
    return found


def _numbers(record: AuditRecord) -> Iterator[_Number]:
    layers = record.provenance.num_layers
    for name in Margins.model_fields:
        yield from _estimate(f"margins/{name}", getattr(record.margins, name), f"margins.{name}")
    yield from _patching(record, layers)
    for name, control in control_items(record):
        if control.verdict != "not_run":
            yield _Number(f"controls/{name}/passed", float(control.verdict == "passed"), f"controls.{name}.verdict")
        if control.value is not None:
            yield _Number(f"controls/{name}/value", control.value, f"controls.{name}.value", reason=control.reason)
        if control.effect is not None and name != "identity":  # exactly 0 wherever it passed
            places, unit, width = list(range(len(control.effect))), "layer", _width(layers - 1)
            if name == "random_subspace":
                places, unit = _ranks(record, len(control.effect)), "rank"
                width = _width(max(places, default=0))
            for place, estimate in zip(places, control.effect, strict=True):
                tag = f"controls/{name}/effect/{unit}_{place:0{width}d}"
                yield from _estimate(tag, estimate, f"controls.{name}.effect", place)
    if (localization := record.localization) is not None:
        for name in ("lasso_lambda", "cv_r2", "center_of_mass", "entropy"):
            yield _Number(f"localization/{name}", getattr(localization, name), f"localization.{name}")
        yield _Number(
            "localization/selected_layers", float(len(localization.selected_layers)), "localization.selected_layers"
        )
        if localization.null_cv_r2:
            yield _Number("localization/null_cv_r2_max", max(localization.null_cv_r2), "localization.null_cv_r2")
        for name in ("lasso_coefficients", "selection_frequency", "null_selection_frequency"):
            yield from _by_layer(f"localization/{name}", getattr(localization, name), f"localization.{name}", layers)
    for basis, by_layer in record.low_rank.items():
        for layer, curve in by_layer.items():
            tag = f"low_rank/{basis}/layer_{layer:0{_width(layers - 1)}d}"
            yield from _low_rank(tag, curve, f"low_rank.{basis}.{layer}")
    yield from _sites(record, layers)
    if (spinal := record.spinal) is not None:
        for name in ("delta_align", "coherence", "reference_coherence", "score"):
            yield _Number(f"spinal/{name}", getattr(spinal, name), f"spinal.{name}")
        name = "gradient_concentration"
        yield from _estimate(f"spinal/{name}", spinal.gradient_concentration, f"spinal.{name}")
        for model, trace in (("policy", spinal.policy), ("reference", spinal.reference)):
            for name in ("contraction", "contraction_r2", "transport"):
                path = f"spinal.{model}.{name}"
                yield from _by_layer(f"spinal/{model}/{name}", getattr(trace, name), path, layers)
    for level in ("info", "warning", "error"):
        count = sum(alert.level == level for alert in record.alerts)
        yield _Number(f"alerts/{level}", float(count), "alerts")
    for name in ("seconds", "peak_memory", "forward_equivalents"):
        yield _Number(f"cost/{name}", float(getattr(record.cost, name)), f"cost.{name}")


def _patching(record: AuditRecord, layers: int) -> Iterator[_Number]:
    patching = record.patching
    if patching is None:
        return
    for name in ("embedding_gain", "head_gain", "embedding_transplant", "head_transplant", "additivity"):
        yield from _estimate(f"patching/{name}", getattr(patching, name), f"patching.{name}")
    peak = math.nan if patching.peak_layer is None else float(patching.peak_layer)
    yield _Number("patching/peak_layer", peak, "patching.peak_layer")
    if (attribution := patching.attribution) is not None:
        for name in ("correlation", "joint_correlation", "patched_pairs", "equivalent_pairs"):
            path = f"patching.attribution.{name}"
            yield from _by_layer(f"patching/attribution/{name}", getattr(attribution, name), path, layers)
    for name in ("effect", "recovery", "layer_gain", "block_transplant"):
        for layer, estimate in enumerate(getattr(patching, name)):
            tag = f"patching/{name}/layer_{layer:0{_width(layers - 1)}d}"
            yield from _estimate(tag, estimate, f"patching.{name}", layer)
    name = "effect_p_adjusted"
    yield from _by_layer(f"patching/{name}", patching.effect_p_adjusted, f"patching.{name}", layers)


def _sites(record: AuditRecord, layers: int) -> Iterator[_Number]:
    for number, (name, curve) in enumerate(zip(site_names(record.sites), record.sites, strict=True)):
        path, tag = f"sites.{number}", f"sites/{name}"
        width = _width(max((unit.head or 0 for unit in curve.units), default=0))
        for place, unit in enumerate(curve.units):
            where = f"layer_{unit.layer:0{_width(layers - 1)}d}"
            where += "" if unit.head is None else f"_head_{unit.head:0{width}d}"
            yield from _estimate(f"{tag}/{where}", curve.sufficiency[place], f"{path}.sufficiency", place)
            yield from _estimate(f"{tag}/necessity/{where}", curve.necessity[place], f"{path}.necessity", place)
            if curve.correlation is not None:
                yield _Number(f"{tag}/correlation/{where}", curve.correlation[place], f"{path}.correlation", place)


def _low_rank(tag: str, curve: LowRankCurve, path: str) -> Iterator[_Number]:
    yield _Number(f"{tag}/rank_95", curve.rank_95, f"{path}.rank_95")
    yield from _estimate(f"{tag}/full_effect", curve.full_effect, f"{path}.full_effect")
    if curve.principal_angles:
        largest = max(curve.principal_angles)
        yield _Number(f"{tag}/largest_principal_angle", largest, f"{path}.principal_angles")
    width = _width(max(curve.ranks, default=0))
    for k, fraction, explained in zip(curve.ranks, curve.effect_fraction, curve.explained_variance_ratio, strict=True):
        rank = f"rank_{k:0{width}d}"
        yield from _estimate(f"{tag}/effect_fraction/{rank}", fraction, f"{path}.effect_fraction", k)
        name = "explained_variance_ratio"
        yield _Number(f"{tag}/{name}/{rank}", explained, f"{path}.{name}", k)


def _estimate(tag: str, estimate: Estimate, path: str, index: int | None = None) -> Iterator[_Number]:
    yield _Number(tag, estimate.mean, path, index, estimate.reason)
    if index is None:
        # One of a row of layers or ranks shows its interval in the pictures: three curves each would bury the rest.
        yield _Number(f"{tag}_low", estimate.low, path, index, estimate.reason)
        yield _Number(f"{tag}_high", estimate.high, path, index, estimate.reason)


def _by_layer(tag: str, values: Sequence[float], path: str, layers: int) -> Iterator[_Number]:
    for layer, value in enumerate(values):
        yield _Number(f"{tag}/layer_{layer:0{_width(layers - 1)}d}", value, path, layer)


def _width(largest: int) -> int:
    # Padded, so that the sorting of tags is the order of layers.
    return max(2, len(str(largest)))


def _ranks(record: AuditRecord, count: int) -> list[int]:
    """The ranks that the random-subspace control ran along: those of the curves, which share them."""
    for by_layer in record.low_rank.values():
        for curve in by_layer.values():
            if len(curve.ranks) == count:
                return curve.ranks
    return list(range(1, count + 1))


# --- texts ------------------------------------------------------------------------------------------------------------


def alert_text(alert: Alert) -> str:
    """An alert in Markdown."""
    where = f", layers {span(alert.layers)}" if alert.layers else ""
    numbers = {"value": alert.value, "baseline": alert.baseline, "threshold": alert.threshold}
    known = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if not is_unknown(value))
    return (
        f"**{alert.level.upper()}: {alert.rule}** (step {alert.step}{where})\n\n"
        f"{alert.message}\n\n*What to do:* {alert.suggestion}" + (f"\n\n*Numbers:* {known}" if known else "")
    )


def controls_table(record: AuditRecord) -> str:
    """What was found, in words; then verdict and reason of every control and of the check of the reference, in Markdown."""
    rows = [(name.replace("_", " "), control.verdict, control.reason) for name, control in control_items(record)]
    said = f"**Finding:** {record.finding.words}\n\n" if record.finding is not None else ""
    check = record.reference_check
    rows.append((f"reference ({check.source})", check.verdict, check.reason))
    return said + _table(
        ("control", "verdict", "why"),
        [
            (name, f"**{verdict.upper()}**" if verdict == "failed" else verdict.replace("_", " "), why)
            for name, verdict, why in rows
        ],
    )


def not_known_table(record: AuditRecord) -> str:
    """Everything that is not known, where, and why, as a Markdown table."""
    rows = []
    for (path, reason), places in not_known(record).items():
        ranks = any(part in path for part in ("effect_fraction", "random_subspace", "explained"))
        unit = "units" if path.startswith("sites.") else "ranks" if ranks else "layers"

        rows.append((f"`{path}`", f"{unit} {span(places)}" if places else "", reason))
    return _table(("not known", "where", "why"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, rows)])


# --- layout -----------------------------------------------------------------------------------------------------------


def custom_scalars_layout(
    probe_names: Sequence[str | None] = (None,), sites: Sequence[SiteCurve] = ()
) -> dict[str, dict[str, list[Any]]]:
    """Charts for TensorBoard's custom-scalars page: intervals as bands, all layers of a quantity in one chart.

    Args:
        probe_names: each probe set has groups of its own, and the tags in a group are those of its set alone.
        sites: the curves of finer sites that will be written, each a chart of its own.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for name in probe_names:
        layout |= _layout_of(_root(name), sites)
    return layout


def _layout_of(root: str, sites: Sequence[SiteCurve]) -> dict[str, dict[str, list[Any]]]:
    def band(path: str) -> list[Any]:
        return ["Margin", [f"{root}/{path}{suffix}" for suffix in ("", "_low", "_high")]]

    def lines(*patterns: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(root)}/{pattern}$" for pattern in patterns]]

    each = r"layer_\d+"
    finer = {
        f"{name.replace('_', ' ')} (nats)": lines(
            f"sites/{name}/{each}" + (r"_head_\d+" if curve.site == "head" else "")
        )
        for name, curve in zip(site_names(sites), sites, strict=True)
    }
    return {
        f"{root}: margins": {
            "margin shift (nats)": band("margins/shift"),
            "chosen log-prob. change (nats per token)": band("margins/chosen_logp_change_per_token"),
            "rejected log-prob. change (nats per token)": band("margins/rejected_logp_change_per_token"),
            "KL to the reference (nats per token)": band("margins/kl"),
            "accuracy": band("margins/accuracy"),
            "entropy, policy and reference": lines("margins/entropy", "margins/reference_entropy"),
            "next-token accuracy, policy and reference": lines(
                "margins/token_accuracy", "margins/reference_token_accuracy"
            ),
        },
        f"{root}: layers": {
            "block transplant by layer (nats)": lines(f"patching/block_transplant/{each}"),
            "layer gain": lines(f"patching/layer_gain/{each}"),
            "recovery by layer": lines(f"patching/recovery/{each}"),
            "noise control by layer (nats)": lines(f"controls/noise/effect/{each}"),
            "additivity": band("patching/additivity"),
            "peak layer": lines("patching/peak_layer"),
            "selection frequency by layer": lines(f"localization/selection_frequency/{each}"),
        },
        f"{root}: low rank": {
            "rank 95, shift basis": lines(f"low_rank/shift/{each}/rank_95"),
            "rank 95, activation basis": lines(f"low_rank/activation/{each}/rank_95"),
            "share of the effect by rank, shift basis": lines(rf"low_rank/shift/{each}/effect_fraction/rank_\d+"),
        },
        **({f"{root}: finer sites": finer} if finer else {}),
        f"{root}: SPINAL": {
            "delta_align": lines("spinal/delta_align"),
            "coherence, policy and reference": lines("spinal/coherence", "spinal/reference_coherence"),
            "gradient concentration": band("spinal/gradient_concentration"),
            "contraction of the policy by layer": lines(f"spinal/policy/contraction/{each}"),
            "transport of the policy by layer": lines(f"spinal/policy/transport/{each}"),
        },
        f"{root}: alerts and controls": {
            "alerts": lines("alerts/warning", "alerts/error"),
            "controls passed": lines(r"controls/\w+/passed"),
        },
    }
