"""Runs made in memory for pages: healthy, ruined, hostile, empty, and one in which nothing is known."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord
from align_audit.record.estimate import Estimate
from align_audit.record.log import Failure, RunLog
from align_audit.record.pair_texts import PairText, PairTexts, TokenChange
from align_audit.record.run import AuditRun
from align_audit.record.training_log import LogRow
from align_audit.writers.web.page_data import page_data
from tests.helpers.alert_cases import health, with_part
from tests.helpers.make_record import make_record, make_run, make_sites
from tests.helpers.screens import LOG, a_run

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--<script>\u2028\u202e\x1b[31m&amp;'\""
"""Markup, a comment, a separator that ends lines of scripts, a turned direction and a colour of terminals."""
FAILED = Failure(step=60, time="2027-01-01T00:00:00+00:00", error="Traceback\n  ...\nRuntimeError: no memory")


def data_in(page: str) -> dict[str, Any]:
    """The value that a page was made of."""
    begin = page.index('id="align-audit-data">') + len('id="align-audit-data">')
    data: dict[str, Any] = json.loads(page[begin : page.index("</script>", begin)])
    return data


def as_run(
    records: Sequence[AuditRecord], failures: Sequence[Failure] = (), log: Sequence[LogRow] = (), name: str = "dpo"
) -> AuditRun:
    """A run with these audits, whose folder is nowhere."""
    alerts = [alert for record in records for alert in record.alerts if alert.event != "open"]
    return AuditRun(Path("/nowhere") / name / "align_audit", list(records), alerts, list(failures), training_log=log)


def ruined_run(**options: Any) -> AuditRun:
    """Healthy to step 10, ruined at 20 and 40, with a checkpoint to go back to."""
    return as_run(a_run("ruined", ["checkpoint-10"]), log=LOG, **options)


def healthy_run() -> AuditRun:
    """All is well, with finer sites at the last audit."""
    records = a_run("well")
    return as_run([*records[:-1], records[-1].model_copy(update={"sites": make_sites(12, 4)})], log=LOG)


def large_run(audits: int = 50, layers: int = 32) -> AuditRun:
    """As large as the largest that has to stay small as a page."""
    log = [LogRow(step, {"loss": 0.7, "rewards/margins": 0.01 * step}) for step in range(2500)]
    return as_run(make_run("destabilizing", audits, layers, low_rank="all", sites=make_sites(layers, 32)), log=log)


def hostile_run() -> AuditRun:
    """Foreign text wherever a record takes any."""
    record = make_record(40)
    alert = Alert(
        rule=HOSTILE, cause=HOSTILE, level="error", step=40, since=40, value=1.0, message=HOSTILE, suggestion=HOSTILE,
        clean_step=0, checkpoint=HOSTILE, command=HOSTILE, remedy=HOSTILE, signals=[HOSTILE],
    )  # fmt: skip
    # Names of probe sets are parts of file names, and hold no slash.
    name = HOSTILE.replace("/", "∕")
    names = {"model_type": HOSTILE, "probe_source": HOSTILE, "probe_name": name}
    control = record.controls.noise.model_copy(update={"reason": HOSTILE, "verdict": "failed"})
    said = {
        "alerts": [alert],
        "provenance": record.provenance.model_copy(update=names),
        "controls": record.controls.model_copy(update={"noise": control}),
        "reference_check": record.reference_check.model_copy(update={"source": HOSTILE, "reason": HOSTILE}),
        "finding": None if record.finding is None else record.finding.model_copy(update={"words": HOSTILE}),
        "reasons": {HOSTILE: HOSTILE},
    }
    failure = Failure(step=41, time=HOSTILE, error=HOSTILE, probe_name=name)
    return as_run([record.model_copy(update=said)], [failure], name=name)


def unknown_run() -> AuditRun:
    """Every number that may be unknown is."""
    return as_run([_unknown(make_record(step, sites=make_sites(12, 4))) for step in (0, 20)])


def health_run() -> AuditRun:
    """Looks only: nothing was patched."""
    return as_run([health(make_record(step)) for step in (0, 10, 20)])


def texts_run(folder: Path, word: str = " fine", lost: float = -6.0) -> AuditRun:
    """A healthy run with what changed in text at its last audit, on disk; ``word`` is a token of every completion.

    ``lost`` is the margin shift of the pair that lost most, of which that token has half.
    """
    log = RunLog(folder)
    for record in (records := a_run("well")):
        log.append(record)

    def pair(place: int, shift: float) -> PairText:
        changes = [0.4, shift / 2, math.nan, -0.1]
        tokens = [
            TokenChange(text=text, change=change) for text, change in zip(["It", word, "\n", "."], changes, strict=True)
        ]
        return PairText(
            pair=place,
            prompt=f"How are you?\n{word}",
            shift=shift,
            chosen=tokens,
            rejected=tokens[:2],
            rejected_tokens=300,
        )

    log.save_texts(
        records[-1], PairTexts(lost=[pair(7, lost)], gained=[pair(1, 8.0), pair(2, 3.0)]).beside(records[-1])
    )
    log.close()
    return AuditRun.load(folder)


def failed_run() -> AuditRun:
    """No audit has come through."""
    return as_run([], [FAILED])


def sets_run() -> AuditRun:
    """Two probe sets, of which the second is being ruined."""
    named = [(name, kind) for name, kind in (("harmless", "healthy"), ("helpful", "destabilizing"))]
    records = [
        with_part(record, "provenance", probe_name=name, policy_hash=f"policy-{record.step}")
        for name, kind in named
        for record in make_run(kind, 3, 4)  # type: ignore[arg-type]
    ]
    return as_run(sorted(records, key=lambda record: record.step))


def _unknown(value: Any) -> Any:
    """The same with NaN for every number that may be one."""
    if isinstance(value, Estimate):
        return Estimate.unknown("nobody knows")
    if isinstance(value, float):
        return math.nan
    if isinstance(value, list):
        return [_unknown(each) for each in value]
    if isinstance(value, dict):
        return {key: _unknown(each) for key, each in value.items()}
    if hasattr(value, "model_copy"):
        fields = type(value).model_fields
        kept = ("config", "cost", "provenance")
        return value.model_copy(update={name: _unknown(getattr(value, name)) for name in fields if name not in kept})
    return value


def first(run: AuditRun) -> dict[str, Any]:
    """What the page shows first."""
    data: dict[str, Any] = page_data(run)["sets"][0]
    return data


def panel(run: AuditRun, key: str) -> dict[str, Any]:
    return next(each for each in first(run)["panels"] if each["key"] == key)


def strings(value: Any) -> Iterator[str]:
    """Every text in a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from strings(key)
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def harmless(letter: str) -> bool:
    """Nothing that controls, ends a line or turns a direction."""
    return letter.isprintable() or letter in "\u200c\u200d" or unicodedata.category(letter) == "Zs"
