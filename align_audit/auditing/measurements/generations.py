"""How policy and reference go on by themselves: greedy continuations of some probe prompts (METHODS §6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import ClassVar

import numpy as np
import torch

from align_audit.auditing.measurements.measurement import AuditTask, Measurement, Reasons
from align_audit.auditing.session.estimates import Estimates
from align_audit.auditing.session.kept import Continued
from align_audit.auditing.session.memory import out_of_memory
from align_audit.errors import first_line, pass_exit_on
from align_audit.measures.continuations import repeated_share, until_end
from align_audit.measures.margin import token_logp
from align_audit.models.generation import can_generate, continue_greedily, end_tokens
from align_audit.models.positions import positions_of
from align_audit.models.replay import Replay
from align_audit.probes.prompts import distinct_prompts
from align_audit.ranks import Agreed, Status
from align_audit.record.audit_record import Generations as GenerationsPart

Prompt = tuple[int, ...]
"""Token ids."""
Active = Callable[[], AbstractContextManager[Replay]]
"""Makes one of the models compute: ``Session.as_policy`` or ``Session.as_reference``."""


class Generations(Measurement):
    """Continues the same prompts with both models; the reference's continuations are made once a run.

    Both write with the tokens that both have, and stop at the tokens that end a text for either: what one model's files say
    of its end, and the other's do not, makes no difference between them.
    """

    name: ClassVar[str | None] = "generations"

    def __init__(self, task: AuditTask) -> None:
        super().__init__(task)
        self.settings = self.config.generations
        models = self.session.models
        self._replays = models.policy, models.reference
        self._vocabulary = min(replay.anatomy.vocab_size for replay in self._replays)
        """Tokens that both models have."""
        limits = [limit for replay in self._replays if (limit := positions_of(replay.model)) is not None]
        self._positions = min(limits, default=None)
        """Tokens that a sequence may have in both models; None: as many as there are."""
        self.prompts = dict(self._drawn()) if self.settings.enabled else {}
        """Place of a pair → its prompt."""
        self._ends = self._end_tokens()
        self._policy = self._reference = Continued([], [], [])
        self._why_not = self._refusal()

    def _drawn(self) -> Iterator[tuple[int, Prompt]]:
        """One pair of each prompt that leaves room, in the order of their tokens' hashes: which are drawn depends on nothing
        but these."""
        return islice(distinct_prompts(self.session.pairs, self._has_room), self.settings.prompts)

    def _has_room(self, prompt: Prompt) -> bool:
        """Whether there is something to go on from, and positions enough to do so."""
        if self._positions is None:
            return len(prompt) > 0
        return 0 < len(prompt) <= self._positions - self.settings.max_new_tokens

    def _end_tokens(self) -> frozenset[int]:
        completions = [
            ids[start:]
            for pair in self.session.pairs
            for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        ]
        ends = frozenset().union(*(end_tokens(replay.model, completions) for replay in self._replays))
        return frozenset(token for token in ends if token < self._vocabulary)

    def _refusal(self) -> str | None:
        if not self.settings.enabled:
            return "switched off (generations.enabled)"
        if not self.prompts:
            return self._why_none_is_drawn()
        for replay in self._replays:
            if not can_generate(replay.model):
                return f"{type(replay.model).__name__} has no generate()"
        return None

    def _why_none_is_drawn(self) -> str:
        shortest = min((pair.chosen_start for pair in self.session.pairs if pair.chosen_start > 0), default=None)
        if shortest is None:
            return "no probe pair has a prompt to go on from"
        return (
            f"the shortest prompt ({shortest} tokens) and generations.max_new_tokens ({self.settings.max_new_tokens}) go "
            f"beyond the {self._positions} positions that the models have; expected a smaller max_new_tokens, or probes with "
            "shorter prompts"
        )

    def look_closer(self, tick: object) -> None:
        """Continue the prompts, and let the reference read what was written."""
        if self._why_not is not None:
            return
        kept, session, ranks = self.task.kept, self.session, self.session.models.ranks
        # What is kept may differ from process to process; what is done next may not.
        self._why_not = ranks.share(kept.why_not_continued)
        if self._why_not is not None:
            return
        if ranks.any(kept.continued is None or kept.continued.ends != self._ends):
            kept.continued = self._tried(session.as_reference, None)
        if kept.continued is None:
            return
        policy = self._tried(session.as_policy, kept.continued)
        if policy is not None:
            self._reference = kept.continued
            self._policy = self._reference if policy.tokens == self._reference.tokens else policy

    def _tried(self, active: Active, beside: Continued | None) -> Continued | None:
        """What the model writes; None on all processes where one cannot, and ``_why_not`` says why.

        Args:
            beside: what the reference writes; None: it is the reference that writes, which is not tried again in this run
                where it cannot. Memory that ran out may be there the next time.
        """
        try:
            return self._continued(active, beside)
        except _NoRoom:
            self._why_not = "memory ran out, also with one prompt at a time"
            return None
        except Agreed:
            self._why_not = "generate() failed on another process"
        # A model whose forward is sound may still have no sound way to go on from its own cache, and say so in any way.
        except (Exception, SystemExit) as error:
            pass_exit_on(error)
            self._why_not = f"generate() failed: {first_line(error)}"
        if beside is None:
            self.task.kept.why_not_continued = self._why_not
        self.session.models.rest()
        return None

    def _continued(self, active: Active, beside: Continued | None) -> Continued:
        """All prompts at once; one after the other where memory does not hold them, here or on another process.

        Raises:
            _NoRoom: nor does it hold one.
            Agreed: another process cannot go on.
        """
        session, prompts = self.session, list(self.prompts.values())
        for count in dict.fromkeys((len(prompts), 1)):
            try:
                with session.models.ranks.together(out_of_memory), active() as replay:
                    parts = [
                        self._written(replay, prompts[first : first + count], first, beside)
                        for first in range(0, len(prompts), count)
                    ]
            except Agreed as agreed:
                if agreed.status is not Status.MEMORY:
                    raise
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            else:
                return Continued(
                    [tokens for part in parts for tokens in part.tokens],
                    [ended for part in parts for ended in part.ended],
                    [surprises for part in parts for surprises in part.surprises],
                    self._ends,
                )
            # Out of the handler, so that the failed call's tensors are free.
            session.models.rest()
            session.free_memory()
        raise _NoRoom

    def _written(self, replay: Replay, prompts: Sequence[Prompt], first: int, beside: Continued | None) -> Continued:
        """What the model makes of these prompts, at once.

        Args:
            first: the place of the first of them among all.
            beside: what the reference made of all.
        """
        rows = continue_greedily(
            replay.model,
            prompts,
            self.settings.max_new_tokens,
            # Processes that bring weights together take the same number of steps, wherever each sees its texts end.
            () if self.session.models.spread else self._ends,
            replay.device,
            range(self._vocabulary, replay.anatomy.vocab_size),
            replay.autocast,
        )
        texts = [until_end(row, self._ends) for row in rows]
        self.session.meter.sample()
        tokens = [text for text, _ in texts]
        read: list[list[float]] = [[] for _ in tokens]
        # Processes that bring weights together call the same modules, whatever each of them has kept.
        if beside is not None and not self.session.models.spread:
            read = [beside.read_before(first + row, text) for row, text in enumerate(tokens)]
        return Continued(tokens, [ended for _, ended in texts], self._surprises(prompts, tokens, read))

    def _surprises(
        self, prompts: Sequence[Prompt], texts: list[list[int]], read: list[list[float]]
    ) -> list[list[float]]:
        """−log ρ of each token of each text behind its prompt, nats.

        Args:
            read: of each text those of its first tokens, where they are known.
        """
        if list(map(len, read)) == list(map(len, texts)):
            return read
        widest = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
        ids = torch.zeros(len(prompts), widest, dtype=torch.long)
        mask, at = torch.zeros_like(ids), []
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            end = len(prompt) + len(text)
            ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *text]), 1
            at += [(row, place) for place in range(len(prompt) + len(read[row]) - 1, end - 1)]
        rows, places = torch.tensor(at).T
        with self.session.as_reference() as replay:
            inputs = {"input_ids": ids.to(replay.device), "attention_mask": mask.to(replay.device)}
            top = replay.record(inputs, top_only=True)
            streams = top.after(replay.num_layers - 1)[rows.to(replay.device), places.to(replay.device)]
            target = ids[rows, places + 1].to(replay.device)
            logp = torch.cat(
                [token_logp(replay.head(streams[block]), target[block]) for block in replay.head_blocks(len(target))]
            )
        rest = (-logp).cpu().split([len(text) - len(begun) for text, begun in zip(texts, read, strict=True)])
        return [[*begun, *part.tolist()] for begun, part in zip(read, rest, strict=True)]

    def part(self) -> tuple[GenerationsPart | None, Reasons]:
        """METHODS §6."""
        if self._why_not is not None:
            return None, {"": self._why_not}
        policy, reference = self._policy, self._reference
        mean, share = self._over_prompts.mean, self._over_prompts.share
        return GenerationsPart(
            prompts=len(self.prompts),
            max_new_tokens=self.settings.max_new_tokens,
            repetition=mean(np.array([repeated_share(text) for text in policy.tokens]), 0.0, 1.0),
            reference_repetition=mean(np.array([repeated_share(text) for text in reference.tokens]), 0.0, 1.0),
            length=mean(np.array([float(len(text)) for text in policy.tokens]), 0.0),
            reference_length=mean(np.array([float(len(text)) for text in reference.tokens]), 0.0),
            ended=share(np.array(policy.ended, dtype=float)),
            reference_ended=share(np.array(reference.ended, dtype=float)),
            surprise=mean(np.array(policy.surprise), 0.0),
            reference_surprise=mean(np.array(reference.surprise), 0.0),
        ), {}

    @property
    def _over_prompts(self) -> Estimates:
        return self.estimates.over(np.array(list(self.prompts)))


class _NoRoom(Exception):
    """Memory holds not even one prompt's continuation."""
