"""Several named probe sets in one run: each has its own records, arrays, curves, alerts and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align_audit import AlignmentAuditCallback, AuditConfig, AuditRecord, AuditRun, audit
from align_audit.alerts.detectors import judge
from align_audit.auditing.audit import run_audit
from align_audit.auditing.measurements.spinal import Spinal
from align_audit.auditing.request import AuditRequest
from align_audit.auditing.session.open_models import OpenModels
from align_audit.auditing.session.reference_cache import ReferenceCache
from align_audit.errors import ConfigurationError, RecordError
from align_audit.models.reference import Reference
from align_audit.record.log import RunLog
from align_audit.record.run import one_per_step
from align_audit.writers.plots import gallery as plots
from tests.cli.test_run import PICTURES
from tests.helpers.audits import QUICK_GENERATIONS, audited
from tests.helpers.callback_runs import quick
from tests.helpers.dpo import ROWS
from tests.helpers.make_record import make_run
from tests.helpers.tiny import perturbed, random_pairs, tiny_model


def named(records: list[AuditRecord], name: str | None) -> list[AuditRecord]:
    return [
        record.model_copy(update={"provenance": record.provenance.model_copy(update={"probe_name": name})})
        for record in records
    ]


# -- one call ----------------------------------------------------------------------------------------------------------


def test_a_named_set_has_the_numbers_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, with the models opened and the reference loaded once for all sets."""
    opened, loaded = [], []
    real = OpenModels._open_replays
    monkeypatch.setattr(OpenModels, "_open_replays", lambda self: opened.append(1) or real(self))
    monkeypatch.setattr(Reference, "_open", lambda self: loaded.append(1) or self._load())
    reference = tiny_model("llama")
    policy = perturbed(reference)
    sets = {"harmless": random_pairs(6), "helpful": random_pairs(5, seed=4)}
    config = AuditConfig.from_dict(
        {"statistics": {"bootstrap_resamples": 100}, "batch_tokens": 150, "generations": QUICK_GENERATIONS}
    )
    before = torch.get_rng_state()
    records = audit(policy, reference, sets, config, step=7)
    assert len(opened) == 1
    assert torch.equal(torch.get_rng_state(), before)
    for name, pairs in sets.items():
        alone = audit(policy, reference, pairs, config, step=7)
        record = records[name]
        assert record.provenance.probe_name == name
        assert alone.provenance.probe_name is None
        assert record.key == (*alone.key[:3], name, "full")
        assert record.cost.forward_equivalents == alone.cost.forward_equivalents
        same = {"provenance": alone.provenance, "cost": alone.cost}
        assert record.model_copy(update=same).to_json() == alone.to_json()

    pairs = random_pairs(4)
    held = Reference("from disk", load=lambda: reference)
    with OpenModels(policy, held) as models:
        for name in ("a", "b"):
            run_audit(models, AuditRequest(pairs, quick(), probe_name=name))
    assert loaded == [1]
    assert held._model is None, "and let go of at the end"


def test_what_the_reference_gives_is_kept_for_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []
    real = Spinal.depth_trace
    monkeypatch.setattr(Spinal, "depth_trace", lambda self, *a: traces.append(1) or real(self, *a))
    reference = tiny_model("llama")
    config = quick(patching={"enabled": False}, spinal={"enabled": True, "gradient_concentration": False})
    cache = ReferenceCache(tmp_path)
    for seed in (1, 2):
        policy = perturbed(reference, seed=seed)
        for name, pairs in {"a": random_pairs(8, longest=20), "b": random_pairs(8, seed=5, longest=20)}.items():
            audited(policy, reference, pairs, config, probe_name=name, cache=cache)
    assert len(traces) == 4 + 2, "the reference once on each set, the policy each time"


def test_names_are_checked_before_models_are_opened() -> None:
    with pytest.raises(ConfigurationError, match="found 'a b' as the name of a probe set"):
        audit("nowhere", None, {"a b": random_pairs(3)})
    with pytest.raises(ConfigurationError, match="found no probe set"):
        AlignmentAuditCallback(probes={})
    with pytest.raises(ConfigurationError, match="two probe sets called 'A' and 'a'"):
        AlignmentAuditCallback(probes={"A": ROWS, "a": ROWS})


# -- the log -----------------------------------------------------------------------------------------------------------


def test_a_log_keeps_sets_apart_and_shows_them_one_by_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    runs = {name: named(make_run("destabilizing", 3, 4), name) for name in ("a", None, "b")}
    for name, records in runs.items():
        for record in records:
            alerts = judge(record, [r for r in log.records if r.step < record.step])
            assert log.append(record.model_copy(update={"alerts": alerts}))
            assert not log.append(record), "the same set is there already"
            log.save_arrays(
                record.step, "arrays" if name is None else f"arrays-{name}", {"x": np.array([len(str(name))])}
            )
    log.append_failure(50, "broken", "b")

    run = AuditRun.load(tmp_path)
    assert len(run.records) == 9
    assert set(run.probe_names) == {"a", None, "b"}
    for name in runs:
        view = run.select(name)
        assert [record.step for record in view.records] == [0, 50, 100]
        assert view.probe_names == [name]
        assert view.alerts == [alert for record in view.records for alert in record.alerts]
        assert [alert.cause for alert in view.alerts].count("drift") >= 1
        assert len({alert.cause for alert in view.alerts if alert.step == 100}) == len(
            [alert for alert in view.alerts if alert.step == 100]
        ), "one cause is one alert"
        assert view.load_arrays(100, "arrays")["x"].tolist() == [len(str(name))]
        assert [failure.error for failure in view.failures] == (["broken"] if name == "b" else [])
        assert view.to_pandas().probes.tolist() == [name] * 3
    with pytest.raises(RecordError, match=r"no audit on the probe set 'c'.*'a'"):
        run.select("c")
    table = run.to_pandas()
    assert table.groupby("probes", dropna=False).size().tolist() == [3, 3, 3]
    assert "provenance.probe_name" not in table
    assert run.to_pandas(layers=True).query("probes == 'b' and step == 50").layer.tolist() == [0, 1, 2, 3]


def test_records_written_before_sets_had_names_are_read() -> None:
    record = make_run(audits=2, layers=2)[1]
    values = json.loads(record.to_json())
    values["schema_version"] = 2
    del values["provenance"]["probe_name"]
    for alert in values["alerts"]:
        del alert["probe_name"]
    old = AuditRecord.from_json(json.dumps(values))
    assert old.provenance.probe_name is None
    assert old.key == record.key


def test_alerts_compare_a_set_with_its_own_past_and_name_it() -> None:
    """The other set's accuracy was far higher; that is no fall of this one's."""
    low, high = make_run("healthy", 2, 4), make_run("healthy", 2, 4)
    config = AuditConfig().alerts

    def with_accuracy(record: AuditRecord, value: float) -> AuditRecord:
        accuracy = record.margins.accuracy.model_copy(update={"mean": value, "low": value - 0.01, "high": value + 0.01})
        return record.model_copy(
            update={"margins": record.margins.model_copy(update={"accuracy": accuracy}), "alerts": []}
        )

    def past(record: AuditRecord) -> AuditRecord:
        return record.model_copy(update={"step": 20})

    (other,) = named([with_accuracy(past(high[1]), 0.95)], "helpful")
    (own,) = named([with_accuracy(past(low[1]), 0.95)], "harmless")
    (record,) = named([with_accuracy(low[1], 0.5)], "harmless")
    assert "accuracy_falling" not in {alert.rule for alert in judge(record, [other], (), config)}
    (alert,) = [alert for alert in judge(record, [other, own], (), config) if alert.rule == "accuracy_falling"]
    assert alert.probe_name == "harmless"
    assert alert.message.startswith("On the probes 'harmless': ")


def test_sets_are_not_mixed_into_one_picture() -> None:
    records = [record for name in ("a", "b") for record in named(make_run("healthy", 2, 3), name)]
    for draw in (one_per_step, plots.margins_over_steps, plots.block_transplants):
        with pytest.raises(
            ValueError, match=r"found records of the probe sets 'a', 'b'; expected those of one.*select"
        ):
            draw(records)


def test_pictures_of_a_named_set_have_its_folder(tmp_path: Path) -> None:
    paths = plots.save_all(named(make_run("healthy", 1, 2), "a"), tmp_path)
    assert set(paths) == {f"a/{name.removesuffix('.png')}" for name in PICTURES}
    assert {path.name for path in (tmp_path / "a").iterdir()} == PICTURES
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
