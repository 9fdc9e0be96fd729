"""One run read back: its records, alerts and failures, and the tables made of them. No model is needed, and none loads."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from align_audit.errors import RecordError, counted, first_line, listed, plain
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, DepthTrace
from align_audit.record.audited_checkpoints import audited_checkpoints
from align_audit.record.course import present_course
from align_audit.record.course_checkpoints import checkpoints_of_course, saved_before_the_next
from align_audit.record.lines import read_lines, read_records
from align_audit.record.log import (
    ALERTS,
    FAILURES,
    FOLDER,
    RECORDS,
    Failure,
    RunLog,
    by_step,
    is_set_aside,
    output_dir_of,
)
from align_audit.record.newest import unread_after
from align_audit.record.numbers import Word, by_series, walk
from align_audit.record.pair_texts import PairTexts
from align_audit.record.places import holds_our_lines, is_log
from align_audit.record.probe_sets_in_use import sets_in_use
from align_audit.record.status import Status, status_of, status_when_left
from align_audit.record.step_files import arrays_name, load_arrays, load_texts
from align_audit.record.stored_records import StoredRecords, chosen, events_of, heads_of
from align_audit.record.training_log import TRAINING, LogRow, read_training_log
from align_audit.record.turns import COURSE, Turn, Turns

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class AuditRun:
    """A stored run, read-only.

    Example:
        >>> run = AuditRun.load("runs/dpo")                         # doctest: +SKIP
        >>> run.records[-1].margins.shift.mean                      # doctest: +SKIP
        3.2
        >>> run.to_pandas(layers=True).query("step == 100")         # doctest: +SKIP
        >>> run.select("harmless").records                          # doctest: +SKIP
    """

    directory: Path
    """The folder of the log."""
    records: Sequence[AuditRecord]
    """By step, then by creation. The lines of a log are validated whole when it is loaded, and made records when they are
    looked at."""
    alerts: list[Alert]
    """By step, what happened to alerts (opened, worse, resolved): of the records, and any other in ``alerts.jsonl``. Those that
    are open at an audit stand in its record."""
    failures: list[Failure]
    """Audits that broke."""
    probe_name: str | None = None
    """The probe set that :meth:`select` has narrowed this to, where it has a name."""
    in_use: bool = True
    """Whether the run is audited on that set to this day: it may have been left out when training was resumed."""
    training_log: Sequence[LogRow] = ()
    """What the trainer logged, by step; empty where none was kept."""
    untold: Sequence[AuditRecord] = ()
    """Of a log that is open for appending: records of whose alerts nobody was told, because the process was killed first."""
    unread: str | None = None
    """What came after the last of the records and cannot be read, in a sentence; None: nothing did."""

    @classmethod
    def of(cls, log: RunLog) -> Self:
        """The run of a log that is open for appending, as it stands now. Failures and the trainer's log are in files only."""
        records = log.records
        return cls(log.directory, records, records.alerts, failures=[], untold=log.untold)

    @property
    def is_set_aside(self) -> bool:
        """Was another run begun in its place (:func:`~align_audit.record.log.is_set_aside`)?"""
        return is_set_aside(self.directory)

    @property
    def output_dir(self) -> Path:
        """The folder that the run was trained into, in which its checkpoints lie; of a log that was copied, that of the log."""
        return output_dir_of(self.directory)

    @property
    def checkpoints(self) -> dict[int, str]:
        """Step → name of the checkpoints that exist now: those in its folder that are of the course that it is on, and saved
        ones elsewhere that were audited into its log."""
        folder = self.output_dir
        of_course = checkpoints_of_course(folder, present_course(self.records))
        if self.is_set_aside:
            of_course = saved_before_the_next(Path(os.path.abspath(self.directory)), folder, of_course)
        return audited_checkpoints(self.directory) | of_course

    @property
    def status(self) -> Status:
        """How the run stands, of the probe set that it was narrowed to where it was."""
        if not self.in_use:
            return status_when_left(self.records)
        return status_of(self.records, self.failures, self.training_log, self.unread)

    @property
    def probe_names(self) -> list[str | None]:
        """The probe sets of the run, in the order of their first audits; None for the one without a name."""
        return list(dict.fromkeys(head.probe_name for head in heads_of(self.records)))

    def select(self, name: str | None) -> Self:
        """The same run, of one probe set: its records, alerts and arrays.

        Raises:
            RecordError: the run has no such set.
        """
        if name not in self.probe_names:
            named = [each for each in self.probe_names if each is not None]
            there = f"there are {', '.join(map(repr, named))}" if named else "its pairs have no name: leave select out"
            raise RecordError(f"no audit on the probe set {name!r} in {self.directory}; {there}")
        records = chosen(self.records, lambda head: head.probe_name == name)
        used = sets_in_use(heads_of(present_course(self.records)), self.failures)
        # An alert of one cause may have been seen on another set, and is open at this one's records all the same.
        stored = {alert.model_dump_json() for head in heads_of(self.records) for alert in head.alerts}
        rest = [alert for alert in self.alerts if alert.probe_name == name and alert.model_dump_json() not in stored]
        alerts = [*(alert for head in heads_of(records) for alert in events_of(head.alerts)), *rest]
        return replace(
            self,
            records=records,
            alerts=sorted(alerts, key=lambda alert: alert.step),
            # One without a name broke before any set was come to.
            failures=[failure for failure in self.failures if failure.probe_name in (name, None)],
            probe_name=name,
            in_use=self.in_use and name in used,
        )

    @classmethod
    def load(cls, output_dir: str | Path) -> Self:
        """Read a run from its output directory, its ``align_audit`` folder, or a ``records.jsonl`` file.

        Nothing on disk changes, also while training goes on: a line that is not whole is left out, with a warning.

        Raises:
            RecordError: nothing there is a run log, or it was written by a newer align_audit.
        """
        path = find_records(Path(output_dir))
        records = read_records(path).by_step()
        if path.name == RECORDS:
            records.turns = Turns(read_lines(path.with_name(COURSE), Turn))
        alerts = records.alerts
        failures: list[Failure] = []
        training_log: list[LogRow] = []
        unread = unread_after(path)
        if path.name == RECORDS:
            in_records = Counter(alert.model_dump_json() for alert in alerts)
            for alert in read_lines(path.with_name(ALERTS), Alert):
                line = alert.model_dump_json()
                if in_records[line]:
                    in_records[line] -= 1
                else:
                    alerts.append(alert)
            failures = read_lines(path.with_name(FAILURES), Failure)
            training_log = read_training_log(path.with_name(TRAINING))
        alerts.sort(key=lambda alert: alert.step)
        return cls(path.parent, records, alerts, failures, training_log=training_log, unread=unread)

    def __repr__(self) -> str:
        """In a line: where it lies, how many audits of which steps and probe set, and how it stands."""
        heads = heads_of(self.records)
        steps = [head.step for head in heads]
        audits = counted(len(heads), "audit")
        between = (
            ""
            if not steps
            else f", step {steps[0]}"
            if len(set(steps)) == 1
            else f", steps {min(steps)} to {max(steps)}"
        )
        names = (
            [self.probe_name]
            if self.probe_name is not None
            else [name for name in self.probe_names if name is not None]
        )
        on = f" on {listed(map(repr, names))}" if names else ""
        return f"<AuditRun {plain(self.directory)}: {audits}{on}{between}, {self.status}>"

    def load_arrays(self, step: int, name: str) -> dict[str, np.ndarray]:
        """The arrays of ``step-<N>/<name>.safetensors``; a missing or damaged file raises ``RecordError``.

        Of a :meth:`select`-ed set with a name, those of ``<name>-<probe name>``.
        """
        return load_arrays(self.directory, step, arrays_name(self.probe_name, name))

    def pair_texts(self, record: AuditRecord) -> PairTexts | None:
        """What changed in text at an audit of this run: the pairs that lost and gained most, token by token.

        It is foreign text: escape it where it is shown.

        Returns:
            None where none was kept (an older log, ``examples.pairs`` 0, an audit whose texts could not be written), and,
            with a warning, where what was kept cannot be read.
        """
        return load_texts(self.directory, record)

    def to_pandas(self, layers: bool = False) -> pd.DataFrame:
        """The run as a table.

        Args:
            layers: False: one row per record, its single numbers in columns named as in the record
                (``margins.shift.mean``, ``margins.shift.low``, ``controls.noise.verdict``); ``alerts`` counts them.
                True: one row per record and layer, with the columns ``step``, ``probes``, ``layer``, ``effect``,
                ``effect_low``, ``effect_high``, …, ``policy_contraction``, ``reference_transport``, …

        ``probes`` is the name of the probe set, None where it has none. What was not measured, or cannot be known, is NaN.
        """
        import pandas

        if layers:
            by_layer = [row for record in self.records for row in layer_rows(record)]
            return pandas.DataFrame(by_layer, columns=None if by_layer else ["step", "layer"])
        rows = [row_of(record) for record in self.records]
        return pandas.DataFrame(rows, columns=None if rows else ["step"])


def run_so_far(directory: Path, history: Sequence[AuditRecord], training_log: Sequence[LogRow]) -> AuditRun:
    """A run that goes on, with the audits that broke so far: of its log only these are read.

    Args:
        directory: of the log.
        history: its audits, by step.
        training_log: what the trainer has logged so far.
    """
    return AuditRun(directory, history, [], read_lines(directory / FAILURES, Failure), training_log=training_log)


def with_this(history: Sequence[AuditRecord], record: AuditRecord) -> Sequence[AuditRecord]:
    """The audits of a run with this one, which may be among them. No stored one is parsed for it."""
    if any(head.key == record.key for head in heads_of(history)):
        return history
    return history.followed_by(record) if isinstance(history, StoredRecords) else [*history, record]


def find_records(path: Path) -> Path:
    """The ``records.jsonl`` of a run: of its output directory, of its ``align_audit`` folder, or the file itself.

    Raises:
        RecordError: nothing there is a run log.
    """
    if path.is_file():
        try:
            is_a_log = (path.name == RECORDS and path.parent.name == FOLDER) or holds_our_lines(path)
        except OSError as error:
            raise RecordError(f"cannot read {plain(path)}: {first_line(error)}") from None
        if not is_a_log:
            raise RecordError(
                f"{plain(path)} holds no audit: none of its first lines is one. Expected a {RECORDS} file"
            )
        return path
    folders = (path / FOLDER, path)
    for folder in folders:
        if is_log(folder):
            return folder / RECORDS
    raise RecordError(
        f"no run log at {path}: looked for {' and '.join(str(folder / RECORDS) for folder in reversed(folders))}. "
        f"Expected the output directory of a training run with an align_audit callback, its {FOLDER} folder, "
        f"or a {RECORDS} file."
    )


def one_per_step(records: Iterable[AuditRecord]) -> list[AuditRecord]:
    """The latest record of each step, by step: a resumed run may have audited a step twice.

    Raises:
        ValueError: the records are of several probe sets, which are not one curve.
    """
    records = list(records)
    names = list(dict.fromkeys(record.provenance.probe_name for record in records))
    if len(names) > 1:
        raise ValueError(
            f"found records of the probe sets {', '.join(map(repr, names))}; expected those of one: AuditRun.select(name)"
        )
    latest: dict[int, AuditRecord] = {}
    for record in sorted(records, key=by_step):
        latest[record.step] = record
    return list(latest.values())


def by_probe_set(records: Iterable[AuditRecord]) -> dict[str | None, list[AuditRecord]]:
    """Records by the name of their probe set, in the order of the first of each; None for the set without a name."""
    sets: dict[str | None, list[AuditRecord]] = {}
    for record in records:
        sets.setdefault(record.provenance.probe_name, []).append(record)
    return sets


# --- tables -----------------------------------------------------------------------------------------------------------


def row_of(record: AuditRecord) -> dict[str, Any]:
    """One record as a row: column → value, of all that stands alone in it; see :meth:`AuditRun.to_pandas`."""
    provenance = record.provenance
    row: dict[str, Any] = {"step": record.step, "probes": provenance.probe_name, "created": provenance.created}
    # Curves of single layers come last: of which layers they are differs from record to record.
    for item in sorted(walk(record, sequences=False), key=lambda item: item.path.startswith("low_rank.")):
        if item.path.startswith("sites."):
            continue
        if isinstance(item, Word) or (item.index is None and item.low is None):
            row[item.path] = item.value
        elif item.index is None:
            row |= {f"{item.path}.mean": item.value, f"{item.path}.low": item.low, f"{item.path}.high": item.high}
    row["alerts"] = sum(alert.event != "resolved" for alert in record.alerts)
    # What the column names say twice.
    del row["provenance.created"], row["provenance.probe_name"]
    return row


_LAYER_COLUMNS = {
    "effect": "patching.effect",
    "effect_p_adjusted": "patching.effect_p_adjusted",
    "recovery": "patching.recovery",
    "layer_gain": "patching.layer_gain",
    "block_transplant": "patching.block_transplant",
    "contribution": "patching.standing_out.contribution",
    "attribution_correlation": "patching.attribution.correlation",
    "joint_correlation": "patching.attribution.joint_correlation",
    "patched_pairs": "patching.attribution.patched_pairs",
    "equivalent_pairs": "patching.attribution.equivalent_pairs",
    "noise_effect": "controls.noise.effect",
    "reverse_effect": "controls.reverse.effect",
    "identity_effect": "controls.identity.effect",
    "lasso_coefficient": "localization.lasso_coefficients",
    "lasso_selected": "localization.selected_layers",
    "selection_frequency": "localization.selection_frequency",
    "null_selection_frequency": "localization.null_selection_frequency",
    "transport_change_stderr": "spinal.transport_change_stderr",
}
"""Column → the sequence of the record that it shows."""

_SETS = ("localization.selected_layers", "spinal.terminal_layers")
"""Sets of layers, of which a table says at each layer whether it belongs."""

_MAY_BE_EMPTY = (
    "spinal.policy.transport", "spinal.policy.transport_stderr", "spinal.reference.transport",
    "spinal.reference.transport_stderr", "spinal.transport_change_stderr",
)  # fmt: skip
"""Columns of NaN where they are empty: above the only layer of a model there is none to travel to, and older records have no
errors of transport."""


def layer_rows(record: AuditRecord) -> list[dict[str, Any]]:
    """One record as a row for each layer: column → value; see :meth:`AuditRun.to_pandas`."""
    layers, series = range(record.provenance.num_layers), by_series(record)
    measured = {path.rpartition(".")[0] for path in series}
    for basis, curves in record.low_rank.items():
        series[f"low_rank.{basis}.rank_95"] = [series[f"low_rank.{basis}.{layer}.rank_95"][0] for layer in curves]
    columns: dict[str, dict[int | None, Any]] = {}
    for name, path in _layer_columns(record).items():
        numbers, part = series.get(path, []), path.rpartition(".")[0]
        if path in _SETS and part in measured:
            members = {number.value for number in numbers}
            columns[name] = {layer: layer in members for layer in layers}
        elif numbers or (path in _MAY_BE_EMPTY and part in measured):
            columns[name] = {number.layer: number.value for number in numbers}
            if any(number.low is not None for number in numbers):
                columns[f"{name}_low"] = {number.layer: number.low for number in numbers}
                columns[f"{name}_high"] = {number.layer: number.high for number in numbers}
    return [
        {"step": record.step, "probes": record.provenance.probe_name, "layer": layer}
        | {name: values.get(layer, math.nan) for name, values in columns.items()}
        for layer in layers
    ]


def _layer_columns(record: AuditRecord) -> dict[str, str]:
    """Column → sequence of the record."""
    low_rank = {f"{basis}_rank_95": f"low_rank.{basis}.rank_95" for basis in record.low_rank}
    traces = {
        f"{model}_{name}": f"spinal.{model}.{name}"
        for model in ("policy", "reference")
        for name in DepthTrace.model_fields
    }
    return _LAYER_COLUMNS | low_rank | traces | {"terminal": "spinal.terminal_layers"}
