"""Records as TensorBoard curves, pictures and text.

By default that is what tells how the run stands: the curves of :mod:`align_audit.writers.few_scalars`, a text
``align_audit health/status``, and of full audits two pictures, ``align_audit health/over_steps`` and
``align_audit where/by_layer``.

With ``scalars="all"`` all else is there too: the curves of :mod:`align_audit.writers.scalars`, under its tags. TensorBoard
cannot draw NaN: what is not known is left out and listed, with its reason, in the text ``align_audit/not_known``. Other texts
are ``align_audit/alerts`` and ``align_audit/controls``; the pictures of :mod:`align_audit.writers.plots.gallery` stand under
``align_audit/<group>/<name>``.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from align_audit.errors import ConfigurationError, named
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, control_items
from align_audit.record.numbers import is_unknown, span
from align_audit.record.open_alerts import since_of
from align_audit.record.run import one_per_step
from align_audit.record.site_curve import SiteCurve
from align_audit.record.site_names import site_names
from align_audit.record.stored_records import events_of, heads_of
from align_audit.record.training_log import LogRow
from align_audit.writers.event_files import SUFFIX, TagsWritten, event_files, find_event_folder
from align_audit.writers.few_pictures import drawn_records, few_pictures
from align_audit.writers.few_scalars import HEALTH, few_scalars, group_of, status_text
from align_audit.writers.markdown import code, escaped
from align_audit.writers.scalars import not_known, root_of, scalars
from align_audit.writers.standing import Standing, standing_at

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from align_audit.config import AuditConfig
    from align_audit.record.run import AuditRun
    from align_audit.writers.writer import Surroundings

logger = logging.getLogger(__name__)

_LAST = {"few": "status", "all": "controls"}
"""The text that is written last of the curves and texts of an audit: where it is, they all are."""
_TEXT = "text_summary"
"""What a summary writer puts below the tag of a text."""


class TensorBoard:
    """Curves, pictures and texts of each audit, beside the trainer's own curves.

    Where the trainer has a summary writer, that one is used: it is flushed, never closed. Else, and once the trainer has
    closed its own, a second event file is opened in the folder that this process has written one to (TensorBoard shows the
    files of a folder as one run), and where there is none, in ``<output_dir>/align_audit/tensorboard``.

    Args:
        output_dir: of the training.
        trainers: gives the trainer's summary writer, None where it has none (any more). Asked at every audit.
        images: draw full audits too.
        probe_names: of all sets that will be written; TensorBoard reads one layout, which has to name them all.
        scalars: ``few``: how the run stands; ``all``: everything, and all pictures.
        training_log: gives what the trainer has logged so far.
    """

    name = "TensorBoard"

    def __init__(
        self,
        output_dir: str | Path,
        trainers: Callable[[], SummaryWriter | None],
        images: bool = True,
        probe_names: Sequence[str | None] = (None,),
        scalars: Literal["few", "all"] = "few",
        training_log: Callable[[], Sequence[LogRow]] = tuple,
    ) -> None:
        self._output_dir = Path(output_dir)
        self._trainers = trainers
        self._images = images
        self._probe_names = tuple(probe_names)
        self._scalars = scalars
        self._training_log = training_log
        self._layout_written = scalars == "few"
        self._opened: SummaryWriter | None = None

    @classmethod
    def of(cls, config: AuditConfig, surroundings: Surroundings) -> Self | None:
        """None where the configuration switches it off."""
        if config.tensorboard == "off":
            return None
        return cls(
            surroundings.output_dir,
            surroundings.trainers_tensorboard,
            images=config.tensorboard_images,
            probe_names=surroundings.probe_names,
            scalars=config.tensorboard_scalars,
            training_log=surroundings.training_log,
        )

    def start(self, run: AuditRun) -> None:
        """Open an event file where the trainer has none, and write what earlier processes had no time to write.

        Raises:
            ConfigurationError: there cannot be one.
        """
        try:
            board = self._summary_writer()
        except OSError as error:
            raise ConfigurationError(
                f"cannot write TensorBoard curves below {self._output_dir}: {error}. Expected a folder that this process may "
                'write to; free it, or switch the curves off (AuditConfig(tensorboard="off"))'
            ) from error
        try:
            self._write_missing(board, run.records)
        except Exception as error:  # of foreign files: what is in the log can be shown again at the next start
            logger.error("align_audit could not write the curves of earlier audits to TensorBoard: %s", named(error))

    def _write_missing(self, board: SummaryWriter, records: Sequence[AuditRecord]) -> None:
        """The curves and texts of audits that no event file of the run holds: a kill came between the log and them, or
        their folder was deleted. Pictures, which take seconds, are drawn of the last of these only."""
        if not records:
            return
        written = TagsWritten(f"/{_LAST[self._scalars]}/{_TEXT}")
        for path in event_files(self._output_dir):
            written.read(path)
        missing = [
            (place, head)
            for place, head in enumerate(heads_of(records))
            if not written.complete(self._root(head.probe_name), head.step, _time_of(head.created) or 0.0)
        ]
        for place, head in missing:
            record = records[place]
            standing = standing_at(record, records, self._training_log())
            self._write(board, standing, written.at(head.step, _time_of(head.created) or 0.0))
        if missing:
            self._draw(board, standing, records)
            board.flush()

    def record(self, record: AuditRecord, history: Sequence[AuditRecord]) -> None:
        """Write one audit at its step; the pictures over steps are of the audits of its probe set up to then."""
        board = self._summary_writer()
        standing = standing_at(record, history, self._training_log())
        try:
            self._write(board, standing)
            self._draw(board, standing, history)
        finally:
            board.flush()

    def _root(self, probe_name: str | None) -> str:
        """What the tag of the text that is written last begins with."""
        return root_of(probe_name) if self._scalars == "all" else group_of(HEALTH, probe_name)

    def _write(self, board: SummaryWriter, standing: Standing, written: Collection[str] = ()) -> None:
        """Curves and texts, but for those whose tags were written; at the time of the audit, whenever that was."""
        record = standing.record
        step, name = record.step, record.provenance.probe_name
        when = _time_of(record.provenance.created)
        if not self._layout_written:
            board.add_custom_scalars(custom_scalars_layout(self._probe_names, record.sites))
            self._layout_written = True
        values = few_scalars(standing)
        alerts = "\n\n".join(map(alert_text, record.alerts))
        news = map(alert_text, events_of(record.alerts))
        texts = {f"{group_of(HEALTH, name)}/status": "\n\n".join((status_text(standing), *news))}
        if self._scalars == "all":
            values |= scalars(record)
            texts |= _texts(record, alerts)
        for tag, value in values.items():
            if tag not in written:
                board.add_scalar(tag, value, step, when)
        for tag, text in texts.items():
            if text and f"{tag}/{_TEXT}" not in written:
                board.add_text(tag, text, step, when)

    def _draw(self, board: SummaryWriter, standing: Standing, history: Sequence[AuditRecord]) -> None:
        """Pictures of a full audit. A health audit has no more to show than its curves."""
        record = standing.record
        if not self._images or record.kind == "health":
            return
        earlier = drawn_records(record, history)
        _add_images(board, standing, earlier)
        if self._scalars == "all":
            _add_gallery(board, one_per_step([*earlier, record]), record)

    def alert(self, alert: Alert, record: AuditRecord) -> None:
        """It stands in the text of its record."""

    def close(self) -> None:
        """Close the event file, where the trainer's was not used."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _summary_writer(self) -> SummaryWriter:
        if (trainers := self._trainers()) is not None:
            return trainers
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = find_event_folder(self._output_dir) or self._output_dir / "align_audit" / "tensorboard"
            self._opened = SummaryWriter(log_dir=str(folder), filename_suffix=SUFFIX)
        return self._opened


def _time_of(created: str) -> float | None:
    """When a record was made, in seconds; None: it does not say so in a way that can be read."""
    try:
        return datetime.datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _add_images(board: SummaryWriter, standing: Standing, earlier: Sequence[AuditRecord]) -> None:
    """The two pictures that there are by default."""
    from align_audit.writers.plots.canvas import pixels

    record = standing.record
    for tag, figure in few_pictures(standing, earlier).items():
        # add_figure would go through pyplot, and its global state.
        board.add_image(tag, pixels(figure), record.step, dataformats="HWC")


def _add_gallery(board: SummaryWriter, records: Sequence[AuditRecord], record: AuditRecord) -> None:
    """All other pictures of a record among those before it, which they show in whole: every one of them is parsed."""
    from align_audit.writers.plots.canvas import pixels
    from align_audit.writers.plots.gallery import pictures_of

    name = record.provenance.probe_name
    for title, picture in pictures_of(records).items():
        if picture.measured(record):
            tag = f"{root_of(name)}/{picture.part}/{title}"
            board.add_image(tag, pixels(picture.draw(records)), record.step, dataformats="HWC")


# --- texts ------------------------------------------------------------------------------------------------------------


def _texts(record: AuditRecord, alerts: str) -> dict[str, str]:
    """Tag → text of all that is said of an audit beside its status; empty where there is nothing to say."""
    root = root_of(record.provenance.probe_name)
    return {
        f"{root}/alerts": alerts,
        f"{root}/not_known": not_known_table(record) if not_known(record) else "",
        f"{root}/{_LAST['all']}": controls_table(record),
    }


def alert_text(alert: Alert) -> str:
    """An alert in Markdown."""
    where = f", layers {span(alert.layers)}" if alert.layers else ""
    numbers = {"value": alert.value, "baseline": alert.baseline, "threshold": alert.threshold}
    given = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if not is_unknown(value))
    if alert.event == "resolved":
        return f"**RESOLVED: {escaped(alert.rule)}** (step {alert.step}; {alert.level} since step {since_of(alert)}{where})"
    return (
        f"**{alert.level.upper()}: {escaped(alert.rule)}** (step {alert.step}{where})\n\n"
        f"{escaped(alert.message)}\n\n*What to do:* {escaped(alert.suggestion)}"
        + (f"\n\n*Numbers:* {given}" if given else "")
    )


def controls_table(record: AuditRecord) -> str:
    """What was found, in words; then verdict and reason of every control and of the check of the reference, in Markdown."""
    rows = [
        (name.replace("_", " "), control.verdict, escaped(control.reason)) for name, control in control_items(record)
    ]
    said = f"**Finding:** {escaped(record.finding.words)}\n\n" if record.finding is not None else ""
    check = record.reference_check
    rows.append((f"reference ({escaped(check.source)})", check.verdict, escaped(check.reason)))
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

        rows.append((code(path), f"{unit} {span(places)}" if places else "", escaped(reason)))
    return _table(("not known", "where", "why"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

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
        layout |= _layout_of(root_of(name), sites)
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
