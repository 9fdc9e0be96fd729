"""How policy and reference go on by themselves: greedy continuations of some probe prompts (METHODS §6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons
from align_audit.auditing.session.estimates import Estimates
from align_audit.auditing.session.kept import Continued
from align_audit.auditing.session.memory import out_of_memory
from align_audit.errors import first_line, named
from align_audit.measures.continuations import repeated_share, until_end
from align_audit.measures.margin import token_logp
from align_audit.models.generation import can_generate, continue_greedily, end_tokens
from align_audit.models.replay import Replay
from align_audit.record.audit_record import Generations as GenerationsPart


class Generations(Measurement):
    """Continues the same prompts with both models; the reference's continuations are made once a run."""

    name: ClassVar[str | None] = "generations"

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.settings = self.config.generations
        self.prompts = dict(self._drawn()) if self.settings.enabled else {}
        """Place of a pair → its prompt."""
        self._policy = self._reference = Continued([], [], [])
        self._why_not = self._refusal()

    def _drawn(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """One pair of each prompt, in the order of their tokens' hashes: which are drawn depends on nothing but these."""
        seen: set[int] = set()
        for place, pair in enumerate(self.session.pairs):
            prompt = pair.chosen_ids[: pair.chosen_start]
            if len(prompt) > 0 and pair.group not in seen and len(seen) < self.settings.prompts:
                seen.add(pair.group)
                yield place, prompt

    def _refusal(self) -> str | None:
        if not self.settings.enabled:
            return "switched off (generations.enabled)"
        if not self.prompts:
            return "no probe pair has a prompt to go on from"
        models = self.session.models
        if not (can_generate(models.policy.model) and can_generate(models.reference.model)):
            return f"{type(models.policy.model).__name__} has no generate()"
        return None

    def look_closer(self, tick: object) -> None:
        """Continue the prompts, and let the reference read what was written."""
        if self._why_not is not None:
            return
        kept, session = self.task.kept, self.session
        try:
            if kept.continued is None:
                with session.as_reference() as replay:
                    kept.continued = self._continued(replay)
            with session.as_policy() as replay:
                self._policy = self._continued(replay)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if out_of_memory(error):
                raise
            # A model whose forward is sound may still have no sound way to go on from its own cache.
            self._why_not = f"generate() failed: {first_line(error) or named(error)}"
            return
        self._reference = kept.continued
        if self._policy.tokens == self._reference.tokens:
            self._policy = self._reference

    def _continued(self, replay: Replay) -> Continued:
        pairs = self.session.pairs
        ends = end_tokens(replay.model, [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
        prompts = list(self.prompts.values())
        rows = continue_greedily(replay.model, prompts, self.settings.max_new_tokens, ends, replay.device)
        texts = [until_end(row, ends) for row in rows]
        self.session.meter.sample()
        tokens = [text for text, _ in texts]
        return Continued(tokens, [ended for _, ended in texts], self._surprise(prompts, tokens))

    def _surprise(self, prompts: list[tuple[int, ...]], texts: list[list[int]]) -> list[float]:
        """−log ρ of each text behind its prompt, nats per token."""
        widest = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
        ids = torch.zeros(len(prompts), widest, dtype=torch.long)
        mask, at = torch.zeros_like(ids), []
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            end = len(prompt) + len(text)
            ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *text]), 1
            at += [(row, place) for place in range(len(prompt) - 1, end - 1)]
        rows, places = torch.tensor(at).T
        with self.session.as_reference() as replay:
            top = replay.record({"input_ids": ids.to(replay.device), "attention_mask": mask.to(replay.device)})
            streams = top.after(replay.num_layers - 1)[rows.to(replay.device), places.to(replay.device)]
            target = ids[rows, places + 1].to(replay.device)
            logp = torch.cat(
                [token_logp(replay.head(streams[block]), target[block]) for block in replay.head_blocks(len(target))]
            )
        lengths = [len(text) for text in texts]
        return [-float(part.mean()) for part in logp.cpu().split(lengths)]

    def part(self) -> tuple[GenerationsPart | None, Reasons]:
        """METHODS §6."""
        if self._why_not is not None:
            return None, {"": self._why_not}
        policy, reference = self._policy, self._reference
        mean, share = self._over_prompts.mean, self._over_prompts.share
        return GenerationsPart(
            prompts=len(self.prompts),
            max_new_tokens=self.settings.max_new_tokens,
            repetition=mean(np.array([repeated_share(text) for text in policy.tokens])),
            reference_repetition=mean(np.array([repeated_share(text) for text in reference.tokens])),
            length=mean(np.array([float(len(text)) for text in policy.tokens])),
            reference_length=mean(np.array([float(len(text)) for text in reference.tokens])),
            ended=share(np.array(policy.ended, dtype=float)),
            reference_ended=share(np.array(reference.ended, dtype=float)),
            surprise=mean(np.array(policy.surprise)),
            reference_surprise=mean(np.array(reference.surprise)),
        ), {}

    @property
    def _over_prompts(self) -> Estimates:
        return self.estimates.over(np.array(list(self.prompts)))
