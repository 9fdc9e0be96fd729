"""When the callback audits."""

from __future__ import annotations

from pydantic import Field

from align_audit.options.part import Part


class ScheduleConfig(Part):
    """When the callback audits, and how much.

    A *full* audit measures everything; a *health* audit patches nothing, and from a run's second one on costs about one
    forward of the policy over the probe pairs, and its continuations (``generations``).

    ``AuditConfig.budget`` bounds the time of what it decides about: a full audit that does not fit is made as a health audit,
    and the record says so; at a checkpoint nothing is made where not even that fits; and health audits between are planned as
    it has room. Made whatever they cost: health audits at the start, at ``first_health`` and its doublings, ``first_health``
    steps after a run was resumed, on the last step (a full one there by ``last_step_seconds``) and where a rule of the
    trainer's log first suspects something (again as the budget has room); the full audit when one of them finds an error (for
    a warning see ``escalate``); and what ``every_n_steps`` and ``on_evaluate`` ask for.
    """

    before_training: bool = True
    """Look before the first step: at whether the reference is the right one, and at what health is measured against."""
    health: bool = True
    """Health audits at ``first_health`` steps, twice that, four times that, ..., and between as often as the budget allows.
    From the fifth doubling on one is made at a checkpoint shortly before it, where there is one. A run that is resumed has one
    ``first_health`` steps after it goes on: what it can afford is known from then on."""
    first_health: int = Field(default=5, ge=1)
    """Steps after which a run is looked at first, once it trains."""
    most_looks: int = Field(default=200, ge=1)
    """Health audits of a run that the budget may add at most."""
    escalate: bool = True
    """A full audit at once when a health audit opens a warning or an error, so that the alert says where. For a warning within
    the budget of the whole run."""
    escalate_seconds: float = Field(default=60.0, ge=0.0, allow_inf_nan=False)
    """For a warning it is made whatever the budget where it should take no longer; for an error however long it takes."""
    on_save: bool = True
    """A full audit where a checkpoint is saved; a health audit where the budget has no room for it, and none where it has no
    room for that either. The first checkpoint that is left out is said."""
    on_evaluate: bool = False
    """A full audit after each evaluation, whatever the budget."""
    every_n_steps: int | None = Field(default=None, ge=1)
    """A full audit at each multiple of so many steps, whatever the budget."""
    on_last_step: bool = True
    """A full audit at the end."""
    last_step_seconds: float = Field(default=60.0, ge=0.0, allow_inf_nan=False)
    """That one is made whatever the budget where it should take no longer: of a run of minutes the budget is seconds."""
