from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Control
from align_audit.record.estimate import Estimate
from align_audit.writers.alert_panel import alert_panel
from align_audit.writers.audit_table import summary_table
from align_audit.writers.terminal import Terminal, progress_bar
from tests.helpers.make_record import make_record, make_sites
from tests.helpers.record_parts import NO_SHIFT


def print_record(record: AuditRecord, console: Console) -> None:
    """All of an audit and its alerts, as a run tells of them."""
    terminal = Terminal(console, verbose=True)
    terminal.record(record, [])
    for alert in record.alerts:
        terminal.alert(alert, record)


def render(thing: Any, terminal: bool = False, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    if isinstance(thing, AuditRecord):
        print_record(thing, console)
    else:
        console.print(thing)
    file.flush()
    return raw.getvalue().decode(encoding)


def words(text: str) -> str:
    """The text without its line breaks and borders."""
    return " ".join(text.replace("│", " ").split())


def row(text: str, label: str) -> str:
    """What stands beside a label, to the next label."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(label))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("   ")), len(lines))
    return words(" ".join(lines[start:end]))[len(label) :].strip()


def test_the_summary_gives_the_records_numbers() -> None:
    record = make_record(100, layers=12)
    text = render(summary_table(record))
    assert text.splitlines()[0].strip() == "align_audit, step 100: 64 pairs, llama with 12 layers"
    shift = record.margins.shift
    assert row(text, "margin shift") == f"{shift.mean:+.1f} [{shift.low:+.1f}, {shift.high:+.1f}] nats"
    assert row(text, "accuracy").startswith(f"{record.margins.accuracy.mean:.2f} [")
    assert row(text, "chosen log-prob.").startswith(f"{record.margins.chosen_logp_change_per_token.mean:+.3f} [")
    assert row(text, "KL to reference").startswith(f"{record.margins.kl.mean:.3f} [")
    patching, spinal = record.patching, record.spinal
    assert patching is not None
    assert spinal is not None
    peak = patching.peak_layer
    assert peak is not None
    transplant = patching.block_transplant[peak]
    assert row(text, "peak layer").startswith(f"{peak}, block transplant {transplant.mean:+.2f} [")
    assert row(text, "additivity").startswith(f"{patching.additivity.mean:.2f} [")
    for layer, curve in record.low_rank["shift"].items():
        rank = "> 16" if math.isnan(curve.rank_95) else f"{curve.rank_95:.0f}"
        assert f"{rank} (layer {layer}, shift basis)" in row(text, "rank_95")
    assert "activation" not in row(text, "rank_95")
    assert row(text, "delta_align") == f"{spinal.delta_align:+.3g}"
    assert row(text, "coherence") == f"{spinal.coherence:.3g} (reference {spinal.reference_coherence:.3g})"
    assert row(text, "controls") == "passed: noise, reverse, identity, random subspace, split half, permuted targets"
    assert row(text, "cost") == "15.6 s, 540 MiB at the peak, 42 forwards"


def test_an_audit_beside_a_trainer_says_what_it_cost_in_training_pairs() -> None:
    record = make_record(100, layers=4)
    cost = record.cost.model_copy(update={"training_pairs": 41.7, "share_of_run": 0.0312})
    said = row(render(summary_table(record.model_copy(update={"cost": cost}))), "cost")
    assert "forwards, as long as training on 42 pairs (3.1% of the run so far)" in said


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("layers", [2, 48])
def test_eighty_columns_are_enough(terminal: bool, layers: int) -> None:
    for record in (
        make_record(0, layers=layers, progress=0.0),
        make_record(100_000, layers=layers, low_rank="all"),
        make_record(200, layers=layers, kind="destabilizing", progress=1.0),
        make_record(5, layers=layers, patching=False, localization=False, low_rank=False, spinal=False),
    ):
        raw = io.StringIO()
        console = Console(file=raw, width=80, force_terminal=terminal, color_system=None)
        print_record(record, console)
        lines = raw.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) < 50
        assert "…" not in raw.getvalue(), "wrapped, never cut"


def test_plain_when_not_a_terminal_and_coloured_when_one() -> None:
    record = make_record(200, kind="destabilizing", progress=1.0)
    plain, coloured = render(record), render(record, terminal=True)
    assert "\x1b" not in plain
    assert not set(plain) & set("─│╭╮╰╯┃━═")
    assert "\x1b[1;31m" in coloured
    assert "╭" in coloured


def test_what_is_unknown_says_why() -> None:
    text = render(make_record(0, progress=0.0))
    assert row(text, "additivity") == f"not known: {NO_SHIFT}"
    assert row(text, "peak layer") == "not known: policy and reference are equal bit by bit"
    off = render(make_record(5, patching=False, localization=False, low_rank=False, spinal=False))
    assert row(off, "SPINAL") == "not known: switched off in the configuration"
    assert row(off, "patching") == "not known: switched off in the configuration"
    record = make_record(100)
    lost = record.margins.model_copy(update={"shift": Estimate.unknown("logits [overflowed]")})
    text = render(record.model_copy(update={"margins": lost}))
    assert row(text, "margin shift") == "not known: logits [overflowed]"


def test_what_is_infinite_is_printed_as_such() -> None:
    """The KL of a ruined policy may overflow: no reason to show nothing at all."""
    record = make_record(100)
    beyond = record.margins.model_copy(update={"kl": Estimate(mean=math.inf, low=0.1, high=math.inf)})
    text = render(record.model_copy(update={"margins": beyond}))
    assert row(text, "KL to reference") == "inf [0.10, inf] nats per token"


def test_failed_controls_stand_out_with_their_reason() -> None:
    record = make_record(100)
    noise = Control(verdict="failed", reason="at the peak layer 7 the intervals overlap: [1, 2] against [0.5, 3]")
    record = record.model_copy(update={"controls": record.controls.model_copy(update={"noise": noise})})
    text = render(record)
    assert (
        row(text, "controls")
        == "passed: reverse, identity, random subspace, split half, permuted targets; failed: noise"
    )
    assert f"not evidence the patching effects and recovery (noise): {noise.reason}" in words(text)
    check = record.reference_check.model_copy(update={"verdict": "failed", "reason": "weights differ"})
    assert row(render(record.model_copy(update={"reference_check": check})), "reference") == (
        "CHECK FAILED: weights differ"
    )
    assert "CHECK FAILED" not in text


def test_peaks_of_finer_sites_are_named() -> None:
    record = make_record(100, layers=12, sites=make_sites())
    out = io.StringIO()
    print_record(record, Console(file=out, width=140))
    text = out.getvalue()
    assert "attention output" in text
    assert "peak layer 5: +1.2" in text
    assert "peak layer 5, head 2: +1.2" in text
    assert "(attribution, correlation 0.9" in text
    assert "peak layers 5–6" in text or "peak layers 5-6" in text


def test_alerts_follow_the_summary_whole() -> None:
    record = make_record(200, kind="destabilizing", progress=1.0)
    for text in (render(record), render(record, terminal=True)):
        text = words(text)
        for alert in record.alerts:
            assert f"{alert.level.upper()} {alert.rule} (step 200" in text
    text = words(render(record))
    for alert in record.alerts:
        assert alert.message in text, "brackets included: they are no markup"
        assert f"To do: {alert.suggestion}" in text
    assert text.index("cost") < text.index(record.alerts[0].message)


def test_an_alert_with_and_without_numbers() -> None:
    alert = Alert(
        rule="x", level="warning", step=3, layers=[1, 2, 3], value=0.25, threshold=0.5, message="m", suggestion="s"
    )
    text = render(alert_panel(alert))
    assert "WARNING x (step 3, layers 1-3)" in words(text.replace("–", "-"))
    assert "value 0.25, threshold 0.5" in text
    bare = render(alert_panel(alert.model_copy(update={"value": math.nan, "threshold": None})))
    assert "value" not in bare


def test_an_output_that_knows_no_unicode_is_no_problem() -> None:
    record = make_record(200, kind="destabilizing", progress=1.0)
    reason = "KL(π‖ρ) is ∞ – stop"
    alert = record.alerts[0].model_copy(update={"message": reason, "layers": [0, 1, 2]})
    record = record.model_copy(update={"alerts": [alert]})
    text = render(record, encoding="ascii")
    assert "KL(?||?) is inf - stop" in text
    assert "layers 0-2" in text
    assert reason in render(record)


def test_the_progress_bar_has_the_interface_of_the_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(3, "align_audit")
    for _ in range(3):
        bar.update(1)
    bar.close()
    assert isinstance(bar.n, int)
    assert capsys.readouterr().err == "", "silent where there is no terminal"
