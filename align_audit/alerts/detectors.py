"""When should somebody look? Pure rules: the records so far in, alerts out. ``RULES`` lists them all.

Two kinds of limit. Absolute ones, per token or as a share of the reference's own value, hold from the first audit,
because a run can be ruined before its second. Once ``baseline_audits`` healthy audits exist, a run is also compared
with itself. An interval has to lie beyond a limit as a whole: a wide interval on few probes raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from align_audit.alerts.history import History, beyond
from align_audit.config import AlertConfig
from align_audit.record.audit_record import GUARDED, Alert, AuditRecord, Estimate
from align_audit.record.stored_records import chosen, heads_of


def evaluate(record: AuditRecord, before: Sequence[AuditRecord], config: AlertConfig) -> list[Alert]:
    """All alerts that ``record`` raises, given the records before it; worst first.

    Args:
        before: earlier records of the same run, oldest first, with their own alerts; those of other probe sets are left
            out, since their numbers are of other pairs.
    """
    if not config.enabled:
        return []
    name = record.provenance.probe_name
    history = History(record, chosen(before, lambda head: head.probe_name == name), config)
    alerts = [alert for rule in RULES for alert in rule(history)]
    if math.isnan(record.margins.kl.low):
        alerts = [
            alert.model_copy(update={"message": f"{alert.message} {_BY_THE_MEAN.format(record.provenance.pairs)}"})
            if alert.rule in _RULES_BY_THE_MEAN
            else alert
            for alert in alerts
        ]
    if name is not None:
        alerts = [
            alert.model_copy(update={"probe_name": name, "message": f"On the probes {name!r}: {alert.message}"})
            for alert in alerts
        ]
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(alerts, key=lambda alert: order[alert.level])


_RULES_BY_THE_MEAN = ("chosen_logp_falling", "kl_out_of_bounds", "entropy_out_of_bounds", "token_accuracy_collapsed")
_BY_THE_MEAN = "(Of {} pairs, too few for an interval: this goes by the mean alone.)"
_SLOW_DOWN = (
    "Go back to the last checkpoint without this alert; lower the learning rate (a factor of 3 to 10), raise beta, or "
    'add an SFT term on the chosen completions (loss_type=["sigmoid", "sft"])'
)


def non_finite(history: History) -> list[Alert]:
    """A model's margins on the probes are NaN or infinite."""
    margins = history.record.margins
    found = []
    for name, value in (("policy", margins.policy), ("reference", margins.reference)):
        if not math.isfinite(value.mean):
            found.append(
                history.alert(
                    "non_finite",
                    "error",
                    value.mean,
                    f"The {name}'s preference margin is {value.mean}: {value.reason or 'not a finite number'}. Weights "
                    "or activations have overflowed; nothing measured on them means anything.",
                    "Stop and restart from the last checkpoint with finite weights, with a lower learning rate, "
                    "gradient clipping (max_grad_norm), or bf16 instead of fp16",
                )
            )
    return found


def reference_mismatch(history: History) -> list[Alert]:
    """The reference is not the policy's starting point, or not the one the trainer uses."""
    check = history.record.reference_check
    if check.verdict != "failed":
        return []
    value = check.precomputed_margin_difference
    return [
        history.alert(
            "reference_mismatch",
            "error",
            math.nan if value is None else value,
            f"Wrong reference ({check.source}): {check.reason}.",
            "Pass the model that training starts from as ref_model (or as reference=), or initialize the adapter with "
            "init_lora_weights=True and bias='none'",
        )
    ]


def reference_changed(history: History) -> list[Alert]:
    """The reference's weights moved during training and no synchronization explains it."""
    if not history.before:
        return []
    record, last = history.record, history.before[-1]
    if record.provenance.reference_hash == last.provenance.reference_hash:
        return []
    if record.reference_check.last_sync_step != last.reference_check.last_sync_step:
        return []
    return [
        history.alert(
            "reference_changed",
            "error",
            math.nan,
            f"The reference ({record.reference_check.source}) is not the one of step {last.step}: its weights changed "
            f"from {last.provenance.reference_hash} to {record.provenance.reference_hash}, and no synchronization did "
            "it. Margins of the two steps have different zero points, in the training log too.",
            "Check for parameters that policy and reference share and that train: biases of a LoRA configuration, "
            "modules_to_save, or one model object passed as both",
        )
    ]


def _low(value: Estimate) -> float:
    """Where the interval begins; the mean where there are too few pairs for one, so that a ruined model is not passed over."""
    return value.mean if math.isnan(value.low) else value.low


def _high(value: Estimate) -> float:
    """Where the interval ends, or the mean."""
    return value.mean if math.isnan(value.high) else value.high


def chosen_logp_falling(history: History) -> list[Alert]:
    """Likelihood displacement: the chosen completions become less likely while the margin rises."""
    config, margins = history.config, history.record.margins
    change = margins.chosen_logp_change_per_token
    why = f"The chosen completions lose {-change.mean:.2f} nats per token against the reference, "
    if _low(margins.shift) > 0:
        why += (
            f"while the margin rises by {margins.shift.mean:.1f} nats: the loss is met by making both completions "
            "unlikely, and the probability goes to text that is in neither."
        )
    else:
        why += "and the margin does not rise."
    level = beyond(-_high(change), config.chosen_drop_warning, config.chosen_drop_error)
    if level is not None:
        limit = config.chosen_drop_error if level == "error" else config.chosen_drop_warning
        return [history.alert("chosen_logp_falling", level, change.mean, why, _SLOW_DOWN, threshold=-limit)]
    baseline = history.baseline(lambda record: record.margins.chosen_logp_change_per_token.mean)
    if baseline is None:
        return []
    # Chosen completions that are still likelier than under the reference are not displaced, whatever the baseline.
    limit = min(3 * baseline, baseline - config.chosen_drop_warning / 2, 0.0)
    if _high(change) < limit:
        return [
            history.alert(
                "chosen_logp_falling",
                "warning",
                change.mean,
                f"{why} At this run's first healthy audits the change was {baseline:+.2f}.",
                _SLOW_DOWN,
                threshold=limit,
                baseline=baseline,
            )
        ]
    return []


def kl_out_of_bounds(history: History) -> list[Alert]:
    """The policy's next-token distribution has moved too far from the reference's."""
    config, kl = history.config, history.record.margins.kl
    level = beyond(_low(kl), config.kl_warning, config.kl_error)
    if level is None:
        return []
    limit = config.kl_error if level == "error" else config.kl_warning
    message = (
        f"KL(policy ‖ reference) is {kl.mean:.2f} nats per token, above {limit:g}. "
        "Preference training that works moves far less; this much means the policy is becoming another model."
    )
    return [history.alert("kl_out_of_bounds", level, kl.mean, message, _SLOW_DOWN, threshold=limit)]


def entropy_out_of_bounds(history: History) -> list[Alert]:
    """Next-token entropy collapses (repetition) or explodes (noise), against the reference's."""
    config, margins = history.config, history.record.margins
    ours, theirs = margins.entropy, margins.reference_entropy
    if not (math.isfinite(ours.mean) and theirs.mean > 0):
        return []
    least, most = config.entropy_ratio_low * theirs.mean, config.entropy_ratio_high * theirs.mean
    if _high(ours) < least:
        limit, words = least, "has collapsed: the policy is certain of every next token and will repeat itself"
    elif _low(ours) > most:
        limit, words = most, "has exploded: the policy is close to choosing tokens at random"
    else:
        return []
    message = f"Next-token entropy {words}. {ours.mean:.2f} nats per token against the reference's {theirs.mean:.2f}."
    return [
        history.alert(
            "entropy_out_of_bounds", "warning", ours.mean, message, _SLOW_DOWN, threshold=limit, baseline=theirs.mean
        )
    ]


def token_accuracy_collapsed(history: History) -> list[Alert]:
    """The policy no longer predicts the chosen completions' tokens that its reference predicts."""
    config, margins = history.config, history.record.margins
    ours, theirs = margins.token_accuracy, margins.reference_token_accuracy
    if not _high(ours) < config.token_accuracy_ratio_error * _low(theirs):
        return []
    message = (
        f"Next-token accuracy on the chosen completions is {ours.mean:.1%}; the reference has {theirs.mean:.1%}. "
        "The policy has lost its language, which loss, reward accuracy and margins do not show."
    )
    return [
        history.alert(
            "token_accuracy_collapsed",
            "error",
            ours.mean,
            message,
            _SLOW_DOWN,
            threshold=config.token_accuracy_ratio_error * theirs.mean,
            baseline=theirs.mean,
        )
    ]


def accuracy_falling(history: History) -> list[Alert]:
    """Preference accuracy on the probes has fallen from its best."""
    config, accuracy = history.config, history.record.margins.accuracy
    seen = [head for head in heads_of(history.before) if head.step > 0 and math.isfinite(head.accuracy.mean)]
    if not seen:
        return []
    best = max(seen, key=lambda head: head.accuracy.mean)
    fall = best.accuracy.mean - accuracy.mean
    level = beyond(fall, config.accuracy_drop_warning, config.accuracy_drop_error)
    if level is None or not accuracy.high < best.accuracy.low:
        return []
    limit = config.accuracy_drop_error if level == "error" else config.accuracy_drop_warning
    message = (
        f"Preference accuracy on the probes is {accuracy.mean:.0%}, down from {best.accuracy.mean:.0%} at step "
        f"{best.step}: what is still being learned does not carry over to these pairs."
    )
    return [
        history.alert(
            "accuracy_falling",
            level,
            accuracy.mean,
            message,
            f"Prefer the checkpoint at step {best.step}; stop earlier, or look at what the latest training pairs teach",
            baseline=best.accuracy.mean,
            threshold=best.accuracy.mean - limit,
        )
    ]


def additivity_collapsed(history: History) -> list[Alert]:
    """The layers' updates no longer act separately."""
    if history.record.patching is None:
        return []
    config, additivity = history.config, history.record.patching.additivity
    baseline = history.baseline(lambda record: record.patching.additivity.mean if record.patching else math.nan)
    limit = config.additivity_warning if baseline is None else min(config.additivity_warning, 0.6 * baseline)
    if not additivity.high < limit:
        return []
    message = (
        f"Additivity is {additivity.mean:.2f}: transplanted one by one, the layers' updates explain only that share of "
        "the margin shift. The rest exists only when all layers move together, away from what each could do in the "
        "reference."
    )
    return [
        history.alert(
            "additivity_collapsed", "warning", additivity.mean, message, _SLOW_DOWN, threshold=limit, baseline=baseline
        )
    ]


def coherence_collapsed(history: History) -> list[Alert]:
    """The depth trace of the terminal block has become jagged."""
    spinal = history.record.spinal
    if spinal is None or not math.isfinite(spinal.coherence):
        return []
    own = history.baseline(lambda record: record.spinal.coherence if record.spinal else math.nan)
    baseline = spinal.reference_coherence if own is None else own
    if not math.isfinite(baseline):
        return []
    share = 1 - history.config.coherence_drop_warning
    limit = share * baseline
    if not spinal.coherence < limit:
        return []
    against = "the reference's" if own is None else "this run's own first"
    message = (
        f"Coherence of the depth trace is {spinal.coherence:.2f}, less than {share:.0%} of {against} {baseline:.2f}: "
        "in the last layers contraction and transport no longer change smoothly from layer to layer."
    )
    return [
        history.alert(
            "coherence_collapsed",
            "warning",
            spinal.coherence,
            message,
            _SLOW_DOWN,
            threshold=limit,
            baseline=baseline,
            layers=spinal.terminal_layers,
        )
    ]


def control_failed(history: History) -> list[Alert]:
    """A control says that a number next to it is not evidence (``value``: how many controls failed)."""
    failed = {
        name: control for name in GUARDED if (control := getattr(history.record.controls, name)).verdict == "failed"
    }
    if not failed:
        return []
    patching = history.record.patching
    named = "; ".join(f"{name.replace('_', ' ')}: {control.reason}" for name, control in failed.items())
    doubted = ", ".join(GUARDED[name] for name in failed)
    return [
        history.alert(
            "control_failed",
            # A broken identity means that the measurement is broken. The others speak of the evidence, not of the run.
            "error" if "identity" in failed else "info",
            float(len(failed)),
            f"Not evidence at this step: {doubted}. Failed controls: {named}.",
            "Audit with more probe pairs (max_pairs) or noise draws; early in training, wait for a larger shift",
            threshold=0.0,
            layers=[] if patching is None or patching.peak_layer is None else [patching.peak_layer],
        )
    ]


RULES: tuple[Callable[[History], list[Alert]], ...] = (
    non_finite,
    reference_mismatch,
    reference_changed,
    chosen_logp_falling,
    kl_out_of_bounds,
    entropy_out_of_bounds,
    token_accuracy_collapsed,
    accuracy_falling,
    additivity_collapsed,
    coherence_collapsed,
    control_failed,
)


__all__ = ["RULES", "evaluate"]
