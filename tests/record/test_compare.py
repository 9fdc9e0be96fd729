"""Runs beside each other: where they meet, what differs, with which interval, and what cannot be compared."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_audit.cli.intervals import interval
from align_audit.config import AuditConfig
from align_audit.errors import RecordError
from align_audit.measures.combined_shares import combined_share_interval
from align_audit.measures.resampling import resample_indices, widened_tail
from align_audit.measures.statistics import mean_interval
from align_audit.record import equal_margin, figures
from align_audit.record.compare import Comparison, Meeting, Reading, Side, compare
from align_audit.record.equal_margin import Term, at_common_margin
from align_audit.record.figures import FIGURES, MARGIN_SHIFT, REWARD_MARGIN, Sample
from align_audit.record.run import AuditRun
from tests.helpers.alert_cases import health, with_part
from tests.helpers.audits import QUICK, audited
from tests.helpers.stored_runs import BETA, PAIRS, record_of, store, store_path, values_of_pairs
from tests.helpers.tiny import random_pairs, tiny_model


def compared(*folders: Path) -> Comparison:
    return compare([Side(folder.name, AuditRun.load(folder)) for folder in folders], interval)


def difference(meeting: Meeting, name: str, number: int = 0) -> Reading:
    row = meeting.row(name)
    assert row is not None
    return row.differences[number]


def readings(meeting: Meeting, name: str) -> list[float]:
    row = meeting.row(name)
    assert row is not None
    return [reading.value for reading in row.readings]


def test_the_examples_hold() -> None:
    for module, examples in ((figures, 2), (equal_margin, 3)):
        results = doctest.testmod(module)
        assert results.attempted == examples
        assert results.failed == 0


def test_the_values_of_pairs_give_the_numbers_of_an_audit() -> None:
    """Of a real one, in which everything was measured that these figures are of."""
    policy, reference = tiny_model("llama", seed=1), tiny_model("llama", seed=0)
    config = AuditConfig.from_dict({**QUICK, "max_pairs": 30})
    pairs = random_pairs(30)
    looked, arrays = audited(policy, reference, pairs, AuditConfig.from_dict({**QUICK, "patching": {"enabled": False}}))
    assert looked.provenance.pairs == 30
    shift = MARGIN_SHIFT.sample
    assert shift is not None
    # Shares of the shift are known where it is.
    pairs = pairs._take(np.flatnonzero(shift(looked, arrays).columns[:, 0] > 0))
    record, arrays = audited(policy, reference, pairs, config)
    record = with_part(record, "provenance", beta=BETA)
    assert len(set(arrays["per_pair.group"].tolist())) == record.provenance.groups
    checked = []
    for figure in (*FIGURES, REWARD_MARGIN, MARGIN_SHIFT):
        value = figure.read(record).value
        if figure.sample is not None and value is not None and not math.isnan(value):
            assert figure.sample(record, arrays).value == pytest.approx(value, rel=1e-9), figure.name
            checked.append(figure.name)
    assert len(checked) == 9, "all but the peak layer and delta_align"


def test_at_the_last_common_step_pairs_are_compared_with_themselves(tmp_path: Path) -> None:
    first = store_path(tmp_path / "a", [0.0, 0.5, 1.0], [0.0, 0.1, 0.2])
    second = store_path(tmp_path / "b", [0.0, 1.0, 3.0, 4.0], [0.0, 0.4, 1.2, 2.0])
    meeting = compared(first, second).at_step
    assert (meeting.kind, meeting.value) == ("step", 20)
    kl = [AuditRun.load(folder).load_arrays(20, "arrays")["per_pair.kl"] for folder in (first, second)]
    expected = mean_interval(kl[1] - kl[0])
    measured = difference(meeting, "kl")
    assert measured.value == pytest.approx(expected.mean)
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))
    apart = (
        mean_interval(kl[1]).high - mean_interval(kl[0]).low - (mean_interval(kl[1]).low - mean_interval(kl[0]).high)
    )
    assert measured.high - measured.low < 0.9 * apart, "what pairs have in common cancels"
    shares = difference(meeting, "reward_accuracy")
    assert shares.value == 0.0
    assert -1.0 <= shares.low <= 0.0 <= shares.high <= 1.0


def test_at_equal_margin_a_run_is_read_between_its_audits(tmp_path: Path) -> None:
    first = store_path(tmp_path / "a", [0.0, 1.0, 2.0], [0.0, 0.1, 0.3])
    second = store_path(tmp_path / "b", [0.0, 4.0], [0.0, 3.0])
    comparison = compared(first, second)
    meeting = comparison.at_margin
    mean = [AuditRun.load(folder).records[-1].margins for folder in (first, second)]
    assert meeting.value == pytest.approx(BETA * mean[0].shift.mean)
    assert [[record.step for record in place.audits] for place in meeting.places] == [[20], [0, 10]]
    weight = mean[0].shift.mean / mean[1].shift.mean
    assert meeting.places[1].weight == pytest.approx(weight)
    assert readings(meeting, "reward_margin") == pytest.approx([meeting.value] * 2)
    assert readings(meeting, "kl") == pytest.approx([mean[0].kl.mean, weight * mean[1].kl.mean])
    row = meeting.row("reward_margin")
    assert row is not None
    assert row.differences == (), "what is equal has no difference"
    assert row.readings[0].low < meeting.value < row.readings[0].high
    assert comparison.margin is REWARD_MARGIN


def test_at_equal_margin_each_resample_meets_at_a_margin_of_its_own(tmp_path: Path) -> None:
    """One draw of pairs after the other: their mean margins and KL at each audit, then straight lines by ``np.interp``."""
    steps = {"a": ([0.0, 1.0, 2.0], [0.0, 0.1, 0.3]), "b": ([0.0, 1.5, 3.0], [0.0, 1.0, 3.0])}
    folders = [store_path(tmp_path / name, *each, seed=5 * place) for place, (name, each) in enumerate(steps.items())]
    paths = []
    for folder in folders:
        run = AuditRun.load(folder)
        arrays = [run.load_arrays(step, "arrays") for step in (0, 10, 20)]
        shift = MARGIN_SHIFT.sample
        assert shift is not None
        margins = [shift(record, each).columns[:, 0] for record, each in zip(run.records, arrays, strict=True)]
        paths.append((np.array(margins), np.array([each["per_pair.kl"] for each in arrays])))
    drawn = []
    for chosen in resample_indices(PAIRS, 1000, seed=0):
        means = [(margins[:, chosen].mean(axis=1), kl[:, chosen].mean(axis=1)) for margins, kl in paths]
        target = min(margins.max() for margins, _ in means)
        first, second = (np.interp(target, margins, kl) for margins, kl in means)
        drawn.append(second - first)
    tail = widened_tail(PAIRS, 0.95)
    measured = difference(compared(*folders).at_margin, "kl")
    assert (measured.low, measured.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])))


def test_intervals_at_equal_margin_cover() -> None:
    """Shifts of N(6, 6) and of N(3, 6), KL of 1 ± 0.1, both 0 at the start: at margin 3 the first has paid one half."""
    rng, draws, covered = np.random.default_rng(3), 400, 0
    start = np.zeros((PAIRS, 1))
    for _ in range(draws):
        margins = [np.hstack([start, rng.normal(mean, 6.0, (PAIRS, 1))]) for mean in (6.0, 3.0)]
        kl = [np.hstack([start, rng.normal(1.0, 0.1, (PAIRS, 1))]) for _ in margins]
        terms = [
            Term(
                run, np.arange(2), tuple(Sample(each[:, [at]], lambda means: means[..., 0]) for at in range(2)), weight
            )
            for run, (each, weight) in enumerate(zip(kl, (-1.0, 1.0), strict=True))
        ]
        made = interval(at_common_margin(margins, terms), None)
        covered += made.low <= 0.5 <= made.high
    assert 0.93 <= covered / draws <= 0.97


def test_shares_at_equal_margin_have_intervals_of_shares_too(tmp_path: Path) -> None:
    """Where all pairs agree no resample differs, and still less than all of those not seen may agree."""
    first = store_path(tmp_path / "a", [0.0, 1.0, 2.0], [0.0, 0.1, 0.3])
    second = store_path(tmp_path / "b", [0.0, 1.0, 4.0], [0.0, 0.1, 3.0])
    meeting = compared(first, second).at_margin
    assert meeting.places[1].weight > 0.0
    assert readings(meeting, "reward_accuracy") == [1.0, 1.0]
    measured = difference(meeting, "reward_accuracy")
    assert measured.low < -0.03 and measured.high > 0.03


def test_a_share_that_places_move_is_known_less_well_than_with_places_held(tmp_path: Path) -> None:
    """Between an audit at which no pair agrees and one at which all but one do, the share goes with the place."""
    last = values_of_pairs(40.0, 0.3)
    last["per_pair.chosen_logp"][0] -= 200.0
    arrays = [values_of_pairs(0.0, 0.0), last]
    first = store(tmp_path / "a", [record_of(10 * at, each) for at, each in enumerate(arrays)], arrays)
    meeting = compared(first, store_path(tmp_path / "b", [0.0, 2.0], [0.0, 0.2], seed=7)).at_margin
    weight = meeting.places[0].weight
    row = meeting.row("reward_accuracy")
    assert row is not None
    reading, hits = row.readings[0], np.arange(PAIRS) > 0
    assert reading.value == pytest.approx(weight * hits.mean())
    held = combined_share_interval(np.column_stack([np.zeros(PAIRS), hits]), np.array([1.0 - weight, weight]))
    assert 0.0 < reading.low < held.low - 0.02
    assert held.high + 0.02 < reading.high < 1.0


def test_where_a_resample_does_not_cross_there_is_no_interval_and_it_is_said(tmp_path: Path) -> None:
    """The first run's first audit lies hardly below the margin of the second: in some draws, beyond."""
    arrays = [values_of_pairs(shift, kl, seed) for shift, kl, seed in ((9.9, 0.1, 1), (30.0, 0.3, 2))]
    first = store(tmp_path / "a", [record_of(10 * at, each) for at, each in enumerate(arrays)], arrays)
    second = store_path(tmp_path / "b", [0.0, 1.0], [0.0, 0.2], seed=7)
    meeting = compared(first, second).at_margin
    assert [len(place.audits) for place in meeting.places] == [2, 1], meeting
    measured = difference(meeting, "kl")
    assert not math.isnan(measured.value)
    assert math.isnan(measured.low)
    assert "resamples give no finite value, because there a run does not come to that margin between two audits" in (
        measured.reason or ""
    )


def test_a_layer_is_no_number_between_two_layers(tmp_path: Path) -> None:
    arrays = [values_of_pairs(shift, 0.1) for shift in (0.0, 10.0, 40.0)]
    records = [record_of(10 * place, values) for place, values in enumerate(arrays)]
    peaks = [
        records[0],
        *(with_part(record, "patching", peak_layer=peak) for record, peak in zip(records[1:], (3, 5), strict=True)),
    ]
    moving = store(tmp_path / "moving", peaks, arrays)
    meeting = compared(store_path(tmp_path / "a", [0.0, 2.0], [0.0, 0.1]), moving).at_margin
    row = meeting.row("peak_layer")
    assert row is not None
    assert row.readings[1].reason == "3 at step 10, 5 at step 20: nothing lies between"


def test_three_runs_are_compared_to_the_first(tmp_path: Path) -> None:
    folders = [store_path(tmp_path / name, [0.0, 1.0], [0.0, kl]) for name, kl in (("a", 0.1), ("b", 0.2), ("c", 0.4))]
    meeting = compared(*folders).at_step
    values = readings(meeting, "kl")
    assert [difference(meeting, "kl", number).value for number in (0, 1)] == pytest.approx(
        [values[1] - values[0], values[2] - values[0]]
    )


# -- what cannot be compared -------------------------------------------------------------------------------------------


def changed(folder: Path, part: str | None = None, **changes: Any) -> Path:
    """A run of two audits of which the second differs in this."""
    arrays = [values_of_pairs(0.0, 0.0), values_of_pairs(10.0, 0.2, seed=1)]
    records = [record_of(10 * place, values) for place, values in enumerate(arrays)]
    if part is None:
        records = [record.model_copy(update=changes) for record in records]
    else:
        records = [with_part(record, part, **changes) for record in records]
    return store(folder, records, arrays)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        (
            "provenance",
            {"probe_hash": "0" * 16},
            "Side by side only, without differences: they were audited on other probe",
        ),
        (None, {"methods_version": 1}, "their numbers are of other versions of the methods (1, 2)"),
        ("provenance", {"beta": 0.5}, "β is 0.1 and 0.5: an equal reward margin is another margin in nats"),
        ("provenance", {"beta": None}, "β is not known of every run, so that margins are margin shifts in nats"),
        ("provenance", {"num_layers": 6}, "Other models: llama with 12 layers and llama with 6 layers"),
        ("provenance", {"compute_dtype": "bfloat16"}, "Other compute dtypes: float32 and bfloat16"),
    ],
)
def test_what_is_not_the_same_is_said(part: str | None, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    comparison = compared(changed(tmp_path / "a"), changed(tmp_path / "b", part, **changes))
    assert any(words in note for note in comparison.notes), comparison.notes
    row = comparison.at_step.row("kl")
    assert row is not None
    assert not any(math.isnan(reading.value) for reading in row.readings)
    assert bool(row.differences) is not words.startswith(("Side by side", "their numbers"))
    assert comparison.margin is (MARGIN_SHIFT if changes.get("beta", 0) is None else REWARD_MARGIN)
    if "num_layers" in changes:
        assert (
            difference(comparison.at_step, "peak_layer").reason
            == "layers of models of other depths are not the same layers"
        )


@pytest.mark.parametrize(("moved", "told"), [(0.0, False), (1e-6, False), (0.1, True)])
def test_one_reference_has_one_margin_whatever_its_hash(moved: float, told: bool, tmp_path: Path) -> None:
    """Under adapters that are off a reference has other names of weights, and so another hash."""
    plain = changed(tmp_path / "a")
    margin = AuditRun.load(plain).records[-1].margins.reference
    other = tmp_path / "b"
    changed(other, "provenance", reference_hash="1" * 16)
    if moved:
        run = AuditRun.load(other)
        mean = margin.model_copy(update={"mean": margin.mean * (1 + moved)})
        arrays = [values_of_pairs(0.0, 0.0), values_of_pairs(10.0, 0.2, seed=1)]
        other = store(tmp_path / "c", [with_part(record, "margins", reference=mean) for record in run.records], arrays)
    notes = compared(plain, other).notes
    assert any("a reference of its own" in note for note in notes) is told


def test_of_equal_models_there_is_no_reward_accuracy(tmp_path: Path) -> None:
    """Before the first step no margin has grown: that is no accuracy of 0, at a step or on a line that begins there."""
    paths = []
    for name in "ab":
        arrays = [values_of_pairs(0.0, 0.0), values_of_pairs(10.0, 0.2, seed=1)]
        first, last = (record_of(10 * place, values) for place, values in enumerate(arrays))
        paths.append(store(tmp_path / name, [with_part(first, "reference_check", same_weights=True), last], arrays))
    paths.append(on_the_way := tmp_path / "c")
    arrays = [values_of_pairs(0.0, 0.0), values_of_pairs(5.0, 0.1, seed=1)]
    first, last = (record_of(10 * place, values) for place, values in enumerate(arrays))
    store(on_the_way, [with_part(first, "reference_check", same_weights=True), last], arrays)
    row = compared(*paths).at_margin.row("reward_accuracy")
    assert row is not None
    assert [math.isnan(reading.value) for reading in row.readings] == [True, True, False]
    assert row.readings[0].reason == "policy and reference are equal"


def on_pairs(steps: dict[int, str], methods: dict[int, int] | None = None) -> tuple[list[Any], list[Any]]:
    """Records by step, each on the pairs of this hash; margins go up by 10 nats a record, KL by 0.2."""
    arrays = [values_of_pairs(10.0 * place, 0.2 * place, seed=place) for place in range(len(steps))]
    records = [
        with_part(record_of(step, each), "provenance", probe_hash=probes * 16)
        for (step, probes), each in zip(steps.items(), arrays, strict=True)
    ]
    versions = methods or {}
    return [each.model_copy(update={"methods_version": versions.get(each.step, 2)}) for each in records], arrays


def test_records_are_compared_pair_by_pair_not_runs_by_their_newest(tmp_path: Path) -> None:
    """Audits of a run on other pairs than its last are left out; other methods count at the records that are read."""
    plain = store(tmp_path / "plain", *on_pairs({0: "a", 10: "a", 20: "a"}))
    swapped = store(tmp_path / "swapped", *on_pairs({0: "b", 10: "a", 20: "a"}))
    comparison = compared(plain, swapped)
    assert list(comparison.sides[1].latest) == [10, 20]
    assert comparison.notes == ("swapped: its audits of steps 0 were on other probe pairs, and are left out.",)
    assert not math.isnan(difference(comparison.at_step, "kl").low)
    assert comparison.at_margin.places[1].audits[0].step >= 10

    newer = store(tmp_path / "newer", *on_pairs(dict.fromkeys((0, 10, 20, 30), "a"), {30: 3}))
    comparison = compared(plain, newer)
    assert comparison.at_step.value == 20
    assert not math.isnan(difference(comparison.at_step, "kl").low), "both records of step 20 are of version 2"
    assert comparison.notes == (
        "At equal margin side by side only, without differences: their numbers are of other versions of the methods (2, 3).",
        "newer: its audits of steps 0, 10, 20 are of another version of the methods than its last, and are left out at equal "
        "margin.",
    )

    older = store(tmp_path / "older", *on_pairs(dict.fromkeys((0, 10, 20, 30), "a"), {20: 1}))
    comparison = compared(plain, older)
    row = comparison.at_step.row("kl")
    assert row is not None
    assert row.differences == ()
    assert comparison.notes[0] == (
        "At the last common step side by side only, without differences: their numbers are of other versions of the methods "
        "(1, 2)."
    )


def test_of_three_runs_one_on_other_pairs_takes_no_difference_from_the_others(tmp_path: Path) -> None:
    folders = [store(tmp_path / name, *on_pairs({0: name, 10: name})) for name in "a"]
    folders += [
        store(tmp_path / name, *on_pairs({0: probes, 10: probes})) for name, probes in (("same", "a"), ("apart", "b"))
    ]
    comparison = compared(*folders)
    assert difference(comparison.at_step, "kl", 0).low == 0.0
    assert math.isnan(difference(comparison.at_step, "kl", 1).value)
    assert comparison.notes == (
        f"apart and a side by side only, without differences: they were audited on other probe pairs ({'a' * 16}, {'b' * 16}).",
    )
    at_margin = difference(comparison.at_margin, "kl", 0)
    assert (at_margin.value, at_margin.reason) == (0.0, "runs on other pairs cannot be drawn with these")


def test_equal_runs_have_nothing_to_note(tmp_path: Path) -> None:
    comparison = compared(changed(tmp_path / "a"), changed(tmp_path / "b"))
    assert comparison.notes == ()
    assert all(reading.value == 0.0 for row in comparison.at_step.rows for reading in row.differences)


def test_without_values_of_pairs_a_difference_has_no_interval_and_says_why(tmp_path: Path) -> None:
    arrays = values_of_pairs(10.0, 0.2)
    shared = with_part(record_of(10, arrays), "provenance", groups=PAIRS // 2)
    lost = np.where(np.arange(PAIRS) == 3, np.nan, arrays["per_pair.kl"])
    cases = {
        "none": (store(tmp_path / "none", [record_of(10, arrays)]), "cannot read the arrays"),
        "unfinite": (
            store(tmp_path / "unfinite", [record_of(10, arrays)], [arrays | {"per_pair.kl": lost}]),
            f"1 of the {PAIRS} values of pairs at step 10 are not finite",
        ),
        "stale": (
            store(tmp_path / "stale", [record_of(10, arrays)], [values_of_pairs(10.0, 0.5)]),
            "do not give the record's number",
        ),
        "shared": (store(tmp_path / "shared", [shared], [arrays]), "which pairs share a prompt is not in this log"),
        "fewer": (
            store(tmp_path / "fewer", [record_of(10, arrays)], [{name: each[:9] for name, each in arrays.items()}]),
            f"are not of its {PAIRS} pairs",
        ),
    }
    first = store(tmp_path / "a", [record_of(10, arrays)], [arrays])
    for folder, words in cases.values():
        measured = difference(compared(first, folder).at_step, "kl")
        assert measured.value == 0.0
        assert math.isnan(measured.low)
        assert words in (measured.reason or "")
    grouped = arrays | {"per_pair.group": np.arange(PAIRS) // 2}
    folders = [store(tmp_path / name, [shared], [grouped]) for name in ("b", "c")]
    assert difference(compared(*folders).at_step, "kl").low == 0.0, "with the groups it can be drawn"


def test_where_runs_do_not_meet_it_is_said(tmp_path: Path) -> None:
    first = store_path(tmp_path / "a", [0.0, 1.0], [0.0, 0.1])
    arrays = values_of_pairs(20.0, 0.2)
    late = store(tmp_path / "late", [record_of(15, arrays)], [arrays])
    comparison = compared(first, late)
    assert comparison.at_step.reason == "no step was audited in every run (a: 0, 10; late: 15)"
    assert comparison.at_margin.reason == "late: its first audit, of step 15, was beyond that margin already"
    away = values_of_pairs(-10.0, 0.2)
    lost = store(tmp_path / "lost", [record_of(10, away)], [away])
    assert compared(first, lost).at_margin.reason == "no margin above 0 was reached by every run"


def test_health_audits_say_nothing_of_where(tmp_path: Path) -> None:
    arrays = values_of_pairs(10.0, 0.2)
    looked = store(tmp_path / "looked", [health(record_of(10, arrays))], [arrays])
    meeting = compared(store_path(tmp_path / "a", [0.0, 1.0], [0.0, 0.1]), looked).at_step
    row = meeting.row("additivity")
    assert row is not None
    assert row.readings[1].reason == "only health was audited at this step"
    assert not math.isnan(row.readings[0].value)


def test_fewer_than_two_audited_runs_are_refused(tmp_path: Path) -> None:
    first = store_path(tmp_path / "a", [0.0], [0.0])
    with pytest.raises(RecordError, match="expected at least two runs to compare, found 1"):
        compared(first)
    empty = tmp_path / "empty"
    (empty / "align_audit").mkdir(parents=True)
    (empty / "align_audit" / "failures.jsonl").touch()
    with pytest.raises(RecordError, match="empty has no audit to compare: No audit has been made yet"):
        compared(first, empty)
