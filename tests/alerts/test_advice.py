"""What to do, with names: the clean step, a checkpoint that exists, the command, the knob."""

from __future__ import annotations

import pytest

from align_audit.alerts.advice import advise, clean_step, newest_checkpoint
from align_audit.options.rules import CAUSES
from align_audit.record.alert import Alert
from align_audit.record.audit_record import AuditRecord, Occasion
from align_audit.record.checkpoint_names import by_step
from align_audit.record.estimate import Estimate
from align_audit.record.stored_records import heads_of
from tests.helpers.alert_cases import about, alerts, healthy, judged, log_of, run, with_margins, with_part


def ruined(step: int = 40) -> AuditRecord:
    return with_margins(healthy(step), kl=about(2.5), token_accuracy=about(0.05))


LOG = log_of(range(1, 41), learning_rate=1e-3)


def advised(checkpoints: list[str], **known: object) -> Alert:
    before = run()
    (alert,) = advise(alerts(ruined(), before), before, LOG, checkpoints=by_step(checkpoints), **known)  # type: ignore[arg-type]
    return alert


def test_it_names_the_newest_checkpoint_that_is_clean_and_exists() -> None:
    alert = advised(["checkpoint-10", "checkpoint-25", "checkpoint-40", "runs"], output_dir="runs/dpo", beta=0.1)
    assert (alert.clean_step, alert.checkpoint) == (30, "checkpoint-25")
    assert alert.command == "trainer.train(resume_from_checkpoint='runs/dpo/checkpoint-25')"
    assert "The last clean audit was at step 30: go back to checkpoint-25" in alert.suggestion
    assert alert.suggestion.endswith("Learning rate 0.001 → 0.0002 or lower, or beta 0.1 → 0.2 or higher")


def test_without_a_kept_checkpoint_it_says_that() -> None:
    alert = advised(["checkpoint-40", "checkpoint-35"])
    assert (alert.clean_step, alert.checkpoint, alert.command) == (30, None, None)
    assert "no checkpoint from then or before was kept; the oldest that exists is of step 35" in alert.suggestion
    assert "save_total_limit" in advised([]).suggestion
    assert "the oldest" not in advised([]).suggestion


def test_at_a_first_audit_nothing_is_clean() -> None:
    (alert,) = advise(alerts(ruined(), []), [], LOG, checkpoints=by_step(["checkpoint-20"]))
    assert (alert.clean_step, alert.checkpoint) == (None, None)
    assert "No audit came before it that could be clean: start again" in alert.suggestion
    assert "No audit before it was clean" not in alert.suggestion, "there was none"


@pytest.mark.parametrize("checkpoints", [[], ["checkpoint-5"]])
def test_where_only_the_model_that_training_started_from_was_clean_saving_more_often_is_no_advice(
    checkpoints: list[str],
) -> None:
    """No trainer saves a checkpoint of step 0."""
    before = judged([healthy(0)])
    (alert,) = advise(alerts(ruined(5), before), before, LOG, checkpoints=by_step(checkpoints))
    assert (alert.clean_step, alert.checkpoint) == (0, None)
    assert "save" not in alert.suggestion and "kept" not in alert.suggestion
    assert "start again from the model" in alert.suggestion


def test_a_wrong_reference_of_an_audit_is_no_fault_of_the_training() -> None:
    """What was given to an audit of saved checkpoints is mended there: nothing is to be trained again."""
    wrong = with_part(healthy(8), "reference_check", verdict="failed", reason="other streams")
    raised = alerts(wrong, [])
    (of_saved,) = advise(raised, [], in_training=False)
    assert of_saved.suggestion == raised[0].suggestion
    assert "--reference" in of_saved.suggestion and "ref_model" not in of_saved.suggestion
    at_work = wrong.model_copy(update={"occasion": Occasion(reason="before training")})
    (in_training,) = advise(alerts(at_work, []), [])
    assert "ref_model" in in_training.suggestion and "start again" in in_training.suggestion


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("level", ["warning", "error"])
@pytest.mark.parametrize("checkpoints", [[], ["checkpoint-20"], ["checkpoint-35"]])
@pytest.mark.parametrize("earlier", ["none", "clean", "not clean"])
def test_each_cause_is_told_where_to_go_back_to_or_why_nowhere(
    cause: str, level: str, checkpoints: list[str], earlier: str
) -> None:
    """One walk over all that the advice depends on: what it names exists, and what it says is so."""
    before = {"none": [], "clean": judged(run()), "not clean": judged([ruined(10), ruined(20)])}[earlier]
    raised = Alert(
        rule="r", cause=cause, level=level, step=40, since=40, value=1.0, message="M.", suggestion="Mend it"
    )  # type: ignore[arg-type]  # fmt: skip
    (alert,) = advise([raised], before, LOG, checkpoints=by_step(checkpoints), output_dir="out")
    said = alert.suggestion
    assert said.startswith("Mend it. ")
    assert (alert.command is None) == (alert.checkpoint is None)
    assert alert.checkpoint is None or alert.checkpoint in said
    if cause in ("learning", "saturation"):
        assert (alert.clean_step, alert.checkpoint) == (None, None), "no earlier state is better"
        assert "checkpoint" not in said and "clean" not in said
        return
    assert ("Should it become an error" in said or "should it become an error" in said) == (level == "warning")
    assert alert.clean_step == (30 if earlier == "clean" else None)
    assert ("No audit came before it" in said) == (earlier == "none")
    assert ("No audit before it was clean" in said) == (earlier == "not clean")
    assert (alert.checkpoint == "checkpoint-20") == (earlier == "clean" and checkpoints == ["checkpoint-20"])
    assert ("no checkpoint from then or before was kept" in said) == (earlier == "clean" and alert.checkpoint is None)
    assert ("the oldest that exists is of step 35" in said) == (earlier == "clean" and checkpoints == ["checkpoint-35"])


def test_while_it_is_open_it_goes_back_to_before_it_opened() -> None:
    before = judged([*run(), ruined(40), ruined(50)])
    (alert,) = advise(alerts(ruined(60), before), before, LOG, checkpoints=by_step(["checkpoint-30", "checkpoint-50"]))
    assert (alert.event, alert.since, alert.clean_step, alert.checkpoint) == ("open", 40, 30, "checkpoint-30")


def test_advice_is_given_anew_and_not_twice() -> None:
    before = run()
    first = advise(alerts(ruined(), before), before, LOG, checkpoints=by_step(["checkpoint-25"]))
    before.append(ruined().model_copy(update={"alerts": first}))
    (unseen,) = advise(alerts(healthy(50), before), before, LOG, checkpoints=by_step(["checkpoint-10"]))
    assert unseen.looks == 0
    assert "go back to checkpoint-10" in unseen.suggestion
    assert "checkpoint-25" not in unseen.suggestion
    assert unseen.suggestion.count("Learning rate") == 1


def test_what_was_resolved_needs_no_advice() -> None:
    before = judged([*run(), with_margins(healthy(40), kl=about(0.5)), healthy(50)])
    found = alerts(healthy(60), before)
    assert [alert.event for alert in found] == ["resolved"]
    assert advise(found, before, LOG, checkpoints=by_step(["checkpoint-30"])) == found


@pytest.mark.parametrize("rate", [None, 0.0, float("nan")])
def test_a_rate_that_is_not_known_is_not_named(rate: float | None) -> None:
    log = [] if rate is None else log_of(range(1, 41), learning_rate=rate)
    (alert,) = advise(alerts(ruined(), run()), run(), log)
    assert "Learning rate" not in alert.suggestion


def test_the_rate_is_no_knob_of_turned_labels() -> None:
    turned = with_margins(healthy(40), shift=about(-3.0), accuracy=about(0.2))
    (alert,) = advise(alerts(turned, run()), run(), LOG, checkpoints=by_step(["checkpoint-30"]), beta=0.1)
    assert (alert.cause, alert.checkpoint) == ("preference", "checkpoint-30")
    assert "Learning rate" not in alert.suggestion


def test_a_step_is_clean_where_all_its_audits_are() -> None:
    heads = heads_of(judged([*run(), ruined(40), healthy(40), healthy(50), healthy(60), healthy(70)]))
    assert clean_step(heads, 40) == 30
    assert clean_step(heads, 1000) == 70
    assert clean_step(heads, 0) is None


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        ([], None),
        (["checkpoint-9", "checkpoint-100"], "checkpoint-9"),
        (["checkpoint-x", "checkpoint-3-old", "3"], None),
    ],
)
def test_checkpoints_are_told_by_their_names(names: list[str], newest: str | None) -> None:
    assert newest_checkpoint(by_step(names), [], 50) == newest


def test_a_checkpoint_that_was_saved_while_an_alert_was_open_is_none_to_go_back_to() -> None:
    """Ruined at 40 and 50, over at 70, ruined again at 90: checkpoint-50 is of the first time."""
    before = judged([*run(), *(ruined(step) for step in (40, 50)), *(healthy(step) for step in (60, 70, 80))])
    assert clean_step(heads_of(before), 90) == 80

    def said(*names: str) -> Alert:
        (alert,) = advise(alerts(ruined(90), before), before, LOG, checkpoints=by_step(names))
        return alert

    assert said("checkpoint-25", "checkpoint-50").checkpoint == "checkpoint-25"
    assert said("checkpoint-50", "checkpoint-75").checkpoint == "checkpoint-75"
    alone = said("checkpoint-50", "checkpoint-65")
    assert (alone.clean_step, alone.checkpoint, alone.command) == (80, None, None)
    assert "no checkpoint from then or before was kept but such as were not clean: start again" in alone.suggestion


def test_an_audit_that_no_rule_was_asked_about_is_not_clean() -> None:
    """Alerts were switched off at 10 to 30, and on when the run was resumed."""
    off = {"alerts": {"enabled": False}}
    before = [with_part(record, "provenance", config=off) if record.step else record for record in run()]
    (alert,) = advise(alerts(ruined(), before), before, LOG, checkpoints=by_step(["checkpoint-20"]))
    assert (alert.clean_step, alert.checkpoint) == (0, None)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_no_knob(rate: float) -> None:
    before = run()
    (alert,) = advise(alerts(ruined(), before), before, learning_rate=rate, beta=0.1)
    assert alert.knob is None
    assert "Learning rate" not in alert.suggestion


def test_beta_is_no_knob_for_numbers_that_overflow() -> None:
    broken = with_margins(healthy(40), policy=Estimate.unknown("5 of 64 values"))
    before = run()
    (alert,) = advise(
        [a for a in alerts(broken, before) if a.cause == "numbers"], before, LOG, checkpoints={}, beta=0.1
    )
    assert "Learning rate 0.001 → 0.0002 or lower" in alert.suggestion and "beta" not in alert.suggestion


@pytest.mark.parametrize(
    ("beta", "in_training", "raised"), [(0.1, True, True), (None, True, False), (None, False, True)]
)
def test_a_loss_without_beta_is_not_told_to_raise_it(beta: float | None, in_training: bool, raised: bool) -> None:
    """Of a saved checkpoint nobody knows its loss."""
    before = run()
    for alert, words in (
        (alerts(ruined(), before)[0], "Lower the learning rate (a factor of 3 to 10)"),
        (alerts(healthy(40), before, log=SATURATED, max_steps=40)[0], "stop here"),
    ):
        (told,) = advise([alert], before, checkpoints={}, beta=beta, in_training=in_training)
        assert words in told.suggestion
        assert ("raise beta" in told.suggestion) is raised


SATURATED = log_of(range(1, 41), loss=1e-6, **{"rewards/accuracies": 1.0})
