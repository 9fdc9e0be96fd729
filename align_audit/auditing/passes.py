"""The passes over the probe pairs: each batch is recorded once, and what the measurements ask for is walked on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from align_audit.auditing.measurements.attribution import Attribution
from align_audit.auditing.measurements.behaviour import Behaviour
from align_audit.auditing.measurements.measurement import AuditTask, Measurement, RecordedBatch, SecondLook
from align_audit.auditing.session.kept import RowsKey, rows_key
from align_audit.auditing.session.unpatched import Unpatched
from align_audit.auditing.session.walk import Session
from align_audit.models.replay import Stream
from align_audit.probes.batches import PairBatch


def first_pass(task: AuditTask, tick: Callable[[], None] = lambda: None) -> None:
    """Every measurement reads every batch; then patched streams are walked, the policy's first.

    Pairs of one role are in one batch (``auditing.session.subsets``): everything is patched on them, or effects at some
    layers, or nothing.
    """

    def update(batch: PairBatch) -> Callable[[], None]:
        recorded = task[Attribution].record(batch) if Attribution in task else _recorded(task.session, batch)
        for measurement in task:
            measurement.read(recorded)
        _walk_policy(task, recorded)
        _walk_reference(task, recorded)

        def commit() -> None:
            for measurement in task:
                measurement.commit(recorded)

        return commit

    task.session.each_batch(update, tick=tick)
    task.session.bring_together(*(measurement.merge for measurement in task))


def health_pass(task: AuditTask, tick: Callable[[], None] = lambda: None) -> None:
    """One forward of the policy over every batch, compared with what is kept of the reference; nothing is patched."""
    session, behaviour, top = task.session, task[Behaviour], task.session.num_layers - 1

    compared: set[RowsKey] = set()

    def update(batch: PairBatch) -> Callable[[], None]:
        at = (batch.row, batch.position)

        def reference_rows() -> torch.Tensor:
            with session.as_reference() as replay:
                return replay.record(batch.model_inputs(), top_only=True).after(top)[at]

        if session.so_for_any(not task.kept.has_rows(batch)):
            task.kept.forget_rows(batch)
        policy, reference = (
            session.record_policy(batch, top_only=True).after(top)[at],
            task.kept.rows(batch, reference_rows),
        )
        if not torch.equal(policy, reference):
            behaviour.identical = False
        behaviour.compare(batch, policy, reference, task.kept)
        return lambda: compared.add(rows_key(batch))

    session.each_batch(update, tick=tick)
    task.kept.forget_rows_but(compared)
    session.bring_together(behaviour.merge)


def _recorded(session: Session, batch: PairBatch) -> RecordedBatch:
    return RecordedBatch(batch, *session.record_both(batch))


def _walk_policy(task: AuditTask, recorded: RecordedBatch) -> None:
    session, batch = task.session, recorded.batch
    streams = list(_of_each(task, lambda measurement: measurement.policy_streams(recorded)))
    if not streams:
        return
    with session.as_policy() as replay:
        unpatched = session.unpatched(replay, batch, recorded.policy, recorded.policy_margins, is_reference=False)
    _walk(task, recorded, streams, into_reference=False, unpatched=unpatched)


def _walk_reference(task: AuditTask, recorded: RecordedBatch) -> None:
    session, batch = task.session, recorded.batch
    if not task.session.is_patched(batch):
        return
    with session.as_reference() as replay:
        recorded.unpatched = session.unpatched(
            replay, batch, recorded.reference, recorded.reference_margins, is_reference=True
        )
    streams = list(_of_each(task, lambda measurement: measurement.streams(recorded)))
    _walk(task, recorded, streams, into_reference=True, unpatched=recorded.unpatched)


def _of_each(task: AuditTask, streams: Callable[[Measurement], Iterable[Stream]]) -> Iterator[Stream]:
    """The streams that each measurement asks for, under keys that say whose they are."""
    for measurement in task:
        for stream in streams(measurement):
            yield Stream((measurement, stream.key), stream.start, stream.make)


def _walk(
    task: AuditTask, recorded: RecordedBatch, streams: Iterable[Stream], *, into_reference: bool, unpatched: Unpatched
) -> None:
    """Walk, subtract the unpatched margin, store. A stream that equals the unpatched one where it joins stays equal."""
    session = task.session
    active, recording = (
        (session.as_reference, recorded.reference) if into_reference else (session.as_policy, recorded.policy)
    )
    same_as = recording if unpatched.strays is None else None
    walked = session.effects(active, recorded.batch, recording, streams, unpatched, same_as=same_as)
    with contextlib.closing(walked):  # now, and not when somebody collects it: it has switched adapters
        for key, effect in walked:
            assert isinstance(key, tuple)
            measurement, within = key
            measurement.store(within, recorded, effect)


def second_pass(session: Session, looks: Sequence[SecondLook], tick: Callable[[], None]) -> None:
    """Walk the streams of all ``looks`` through the reference, over all pairs once.

    Where a batch is one of the first pass's, the unpatched run's margins are those of then, to the bit, and the reference is
    not run to the end again. Other batches (planned anew after running out of memory) compute them; and where a replay does
    not give the recording back bit by bit, the unpatched run is walked as the streams are.
    """
    looks = [look for look in looks if look.layers]
    if not looks:
        return
    top = max(max(look.layers) for look in looks)

    def update(batch: PairBatch) -> None:
        if not session.is_exact(batch):
            return
        places = batch.pair_index.cpu().numpy()
        unpatched = session.unpatched_before(batch)
        if session.so_for_any(unpatched is None):
            unpatched = None
        policy, reference = session.record_both(batch, until=top, whole_reference=unpatched is None)
        if unpatched is None:
            strays = list(range(session.num_layers)) if session.reference_strays else None
            with session.as_reference() as replay:
                unpatched = session.compared_with(replay, batch, reference, None, strays)

        def streams() -> Iterator[Stream]:
            for number, look in enumerate(looks):
                for stream in look.streams(batch, policy, reference):
                    yield Stream((number, stream.key), stream.start, stream.make)

        walk = session.effects(session.as_reference, batch, reference, streams(), unpatched)
        with contextlib.closing(walk) as walked:
            for key, effect in walked:
                assert isinstance(key, tuple)
                number, within = key
                looks[number].store(within, places, effect.numpy())

    session.each_batch(update, tick=tick)
    session.bring_together(*(look.merge for look in looks))


def expected_batches(task: AuditTask) -> int:
    """How many batches all passes will take, if memory suffices."""
    passes = 1 + any(measurement.may_look_again for measurement in task)
    return passes * len(task.session.plan) + sum(measurement.batches for measurement in task)
