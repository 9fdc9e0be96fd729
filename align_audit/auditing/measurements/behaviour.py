"""What both models say of the pairs: margins, log-probabilities, KL, entropy, token accuracy (METHODS, notation and §6)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons, RecordedBatch
from align_audit.auditing.session.accumulators import PerPair, PerToken, State
from align_audit.auditing.session.kept import KeptReference
from align_audit.measures.margin import TokenReadout, compare_readouts, sum_by_pair
from align_audit.models.replay import equal_streams
from align_audit.probes.batches import PairBatch
from align_audit.ranks import Ranks
from align_audit.record.audit_record import Margins
from align_audit.record.estimate import Estimate


@dataclass
class BehaviourState(State):
    """Log-probabilities in nats, summed over completion tokens; KL and entropies in nats per token; accuracies in [0, 1].

    ``token_changes``: log π − log ρ of each token, nats; nothing is put where no pair is kept as text.
    """

    token_changes: PerToken
    chosen_logp: PerPair
    rejected_logp: PerPair
    reference_chosen_logp: PerPair
    reference_rejected_logp: PerPair
    chosen_tokens: PerPair
    rejected_tokens: PerPair
    kl: PerPair
    entropy: PerPair
    reference_entropy: PerPair
    token_accuracy: PerPair
    reference_token_accuracy: PerPair


class Behaviour(Measurement):
    """Reads both models at the prediction positions, and keeps the margins that patched runs are compared with.

    Attributes:
        identical: policy and reference gave the same residual streams, bit by bit, on every probe token; in a health audit
            the same last streams where tokens are predicted.
    """

    name: ClassVar[str | None] = "margins"
    state: BehaviourState

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        pairs = len(self.session.pairs)
        self.state = BehaviourState(PerToken(pairs), *(PerPair(pairs) for _ in range(11)))
        self.identical = True

    def read(self, recorded: RecordedBatch) -> None:
        """Log-probabilities, KL, entropies and next-token accuracy; fills the batch's margins."""
        batch, top = recorded.batch, self.session.num_layers - 1
        valid, at = batch.position_mask("all"), (batch.row, batch.position)
        if not equal_streams(recorded.policy.streams, recorded.reference.streams, valid):
            self.identical = False
        rows = recorded.policy.after(top)[at], recorded.reference.after(top)[at]
        recorded.policy_margins, recorded.reference_margins = self.compare(batch, *rows)

    def compare(
        self,
        batch: PairBatch,
        policy_rows: torch.Tensor,
        reference_rows: torch.Tensor,
        kept: KeptReference | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read both models' last streams [P, d] at a batch's prediction entries: their margins [B], float64 on the CPU.

        Args:
            kept: where the reference's rows come from: what is read from them is kept there too.
        """
        state = self.state
        values = self._readouts(batch, policy_rows, reference_rows, kept)

        def sums(name: str) -> torch.Tensor:
            return sum_by_pair(values[name], batch.pair, batch.side, batch.num_pairs)

        tokens = sum_by_pair(torch.ones_like(values["kl"]), batch.pair, batch.side, batch.num_pairs)
        state.chosen_tokens.put(batch, tokens[0])
        state.rejected_tokens.put(batch, tokens[1])
        if self.config.examples.pairs:
            state.token_changes.put(batch, values["logp"] - values["reference_logp"])
        margins = []
        for prefix, chosen_logp, rejected_logp, entropy, token_accuracy in (
            ("", state.chosen_logp, state.rejected_logp, state.entropy, state.token_accuracy),
            (
                "reference_", state.reference_chosen_logp, state.reference_rejected_logp, state.reference_entropy,
                state.reference_token_accuracy,
            ),
        ):  # fmt: skip
            chosen, rejected = sums(prefix + "logp")
            margins.append((chosen - rejected).cpu())
            chosen_logp.put(batch, chosen)
            rejected_logp.put(batch, rejected)
            entropy.put(batch, sums(prefix + "entropy").sum(0) / tokens.sum(0))
            token_accuracy.put(batch, sums(prefix + "token_accuracy")[0] / tokens[0])
        state.kl.put(batch, sums("kl").sum(0) / tokens.sum(0))
        return margins[0], margins[1]

    def _readouts(
        self,
        batch: PairBatch,
        policy_rows: torch.Tensor,
        reference_rows: torch.Tensor,
        kept: KeptReference | None,
    ) -> dict[str, torch.Tensor]:
        """What each prediction entry [P] says, by name; the reference's names begin with ``reference_``."""
        session = self.session
        read_before = None if kept is None else kept.readout(batch)

        def of_reference(block: slice) -> torch.Tensor:
            with session.as_reference() as replay:
                return replay.head(reference_rows[block])

        parts: list[tuple[TokenReadout, TokenReadout, torch.Tensor]] = []
        for block in session.models.policy.head_blocks(batch.row.numel()):
            with session.as_policy() as replay:
                policy_logits = replay.head(policy_rows[block])
            if kept is None or session.models.spread:  # there all processes call the head, whatever one of them keeps
                reference_logits = of_reference(block)
            else:
                reference_logits = kept.logits(batch, block, functools.partial(of_reference, block))
            session.meter.sample()
            of_block = None if read_before is None else read_before.at(block)
            parts.append(compare_readouts(policy_logits, reference_logits, batch.target[block], of_block))
        policy, reference = (TokenReadout.joined(each) for each in list(zip(*parts, strict=True))[:2])
        if kept is not None and read_before is None:
            kept.keep_readout(batch, reference)
        values = {"kl": torch.cat([kl for *_, kl in parts])}
        for prefix, readout in (("", policy), ("reference_", reference)):
            values[prefix + "logp"] = readout.logp
            values[prefix + "entropy"] = readout.entropy
            values[prefix + "token_accuracy"] = readout.correct
        return values

    def merge(self, ranks: Ranks, places: np.ndarray) -> None:
        """Equal on every probe token is what is so on every process."""
        super().merge(ranks, places)
        self.identical = not ranks.any(not self.identical)

    # -- of all pairs --------------------------------------------------------------------------------------------------

    @property
    def policy_margin(self) -> np.ndarray:
        """[N] m_i(π), nats; an infinite log-probability on both sides is NaN."""
        with np.errstate(invalid="ignore"):
            margin: np.ndarray = self.state.chosen_logp.values - self.state.rejected_logp.values
        return margin

    @property
    def reference_margin(self) -> np.ndarray:
        """[N] m_i(ρ), nats."""
        with np.errstate(invalid="ignore"):
            margin: np.ndarray = self.state.reference_chosen_logp.values - self.state.reference_rejected_logp.values
        return margin

    @property
    def shift(self) -> np.ndarray:
        """[N] Δ_i = m_i(π) − m_i(ρ), nats."""
        with np.errstate(invalid="ignore"):
            shift: np.ndarray = self.policy_margin - self.reference_margin
        return shift

    @property
    def mean_shift(self) -> Estimate:
        """Of Δ_i over the pairs."""
        return self.estimates.mean(self.shift)

    def part(self) -> tuple[Margins, Reasons]:
        """METHODS, notation and §6."""
        state, mean = self.state, self.estimates.mean
        finite = np.isfinite(self.shift)
        with np.errstate(invalid="ignore"):
            chosen = state.chosen_logp.values - state.reference_chosen_logp.values
            rejected = state.rejected_logp.values - state.reference_rejected_logp.values
        return Margins(
            reference=mean(self.reference_margin),
            policy=mean(self.policy_margin),
            shift=mean(self.shift),
            accuracy=self._accuracy(np.where(finite, self.shift > 0, np.nan)),
            ranking_accuracy=self.estimates.share(
                np.where(np.isfinite(self.policy_margin), self.policy_margin > 0, np.nan)
            ),
            chosen_logp_change=mean(chosen),
            rejected_logp_change=mean(rejected),
            chosen_logp_change_per_token=mean(chosen / state.chosen_tokens.values),
            rejected_logp_change_per_token=mean(rejected / state.rejected_tokens.values),
            kl=mean(state.kl.values, 0.0),
            entropy=mean(state.entropy.values, 0.0),
            reference_entropy=mean(state.reference_entropy.values, 0.0),
            token_accuracy=mean(state.token_accuracy.values, 0.0, 1.0),
            reference_token_accuracy=mean(state.reference_token_accuracy.values, 0.0, 1.0),
        ), {}

    def _accuracy(self, hits: np.ndarray) -> Estimate:
        """Share of pairs [N] whose margin grew, with its interval."""
        if self.identical and not hits.any():
            return self.estimates.mean(hits)  # equal models: exactly 0, and no sample of anything
        return self.estimates.share(hits)
