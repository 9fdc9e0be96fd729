"""What a user says of one rule: switched off, tuned, or added. Part of ``AlertConfig``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PlainSerializer, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from align_audit.errors import ConfigurationError, plain, quoted
from align_audit.options.part import Part
from align_audit.options.rules import CAUSES, LIMITS, RETIRED, RULES, Rule, did_you_mean, rule_named, rule_names
from align_audit.options.signals import SIGNALS, TO_THE_NEXT_LAYER, is_signal, layer_of


def _name_of(check: Callable[..., Any] | None) -> str | None:
    if check is None:
        return None
    return f"{getattr(check, '__module__', '?')}.{getattr(check, '__qualname__', type(check).__name__)}"


if TYPE_CHECKING:

    class Limits(Part):
        """The limits of all rules, each an option under its name."""

        def __getattr__(self, option: str) -> float: ...

else:
    Limits = create_model(
        "Limits",
        __base__=Part,
        __doc__="The limits of all rules, each an option under its name.",
        **{
            name: (
                Annotated[float, Field(gt=limit.above, lt=limit.below if limit.bounded else None)],
                limit.default,
            )
            for name, limit in LIMITS.items()
        },
    )


class RuleOptions(Part):
    """How a rule of the table is used."""

    enabled: bool = True
    patience: Annotated[int, Field(ge=1, le=20)] | None = None
    """Looks in a row after which it counts by itself; None: as in the table."""
    level: Literal["warning", "error"] = "error"
    """The highest level that it may give."""


class AddedRule(Part):
    """A rule of the user's own: a number and a limit, or a function.

    Example:
        >>> AddedRule(signal="margins.kl", above=0.2).level
        'warning'
    """

    signal: str | None = None
    """A dotted path in a record (``margins.kl``, ``patching.layer_gain.3``), or a column of the trainer's log (``loss``)."""
    above: Annotated[float, Field(allow_inf_nan=False)] | None = None
    below: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """It fires beyond this; where the number has an interval, the whole interval has to lie there."""
    check: Annotated[Callable[[Any], str | None] | None, PlainSerializer(_name_of, when_used="json")] = None
    """Instead: a function of the :class:`~align_audit.alerts.history.History`, which returns what it has to say, or None."""
    level: Literal["warning", "error"] = "warning"
    patience: int = Field(default=1, ge=1, le=20)
    suggestion: str = ""
    """What to do about it."""

    @model_validator(mode="after")
    def _reads_something(self) -> Self:
        if self.check is not None:
            if self.signal is not None or self.above is not None or self.below is not None:
                raise ValueError("expected a function alone in check, or a signal with above or below; found both")
            return self
        if self.signal is None:
            raise ValueError(
                "expected a signal with above or below, such as {signal: margins.kl, above: 0.2}; found none"
            )
        if not is_signal(self.signal):
            raise ValueError(
                f"no signal {quoted(self.signal)}: expected a number of a record such as margins.kl, or a column of the "
                f"trainer's log such as grad_norm{did_you_mean(self.signal, list(SIGNALS))}"
            )
        if (self.above is None) == (self.below is None):
            raise ValueError("expected either above or below, the limit of the signal; found both or neither")
        return self


RuleSetting = RuleOptions | AddedRule

RESERVED = frozenset({*CAUSES, *RETIRED})
"""Causes, which an added rule's name would be one of, and what records of earlier versions alerted to."""

_Setting = TypeVar("_Setting", RuleOptions, AddedRule)


def read_rules(values: Mapping[Any, Any]) -> tuple[dict[str, RuleSetting], dict[str, Any]]:
    """What ``alerts.rules`` says, sorted out: what to do with each rule, and the limits of rules, which are options beside it.

    Args:
        values: name of a rule → ``off`` or False; ``on`` or True; a mapping of its options and limits; or, for a name that
            is not in the table, what :class:`AddedRule` takes, or a function.

    Raises:
        PydanticCustomError: no rule has the name, and nothing is said of what it would read; or what is said is not valid.
            Its context names the place.
    """
    rules: dict[str, RuleSetting] = {}
    limits: dict[str, Any] = {}
    for name, said in values.items():
        if not isinstance(name, str):
            raise wrong(f"expected names of rules, found {quoted(name)}", "rules")
        rule = rule_named(name)
        if rule is None:
            if name in RESERVED:
                raise wrong(
                    f"{quoted(name)} is no name for a rule: alerts of this name mean something else", "rules", name
                )
            rules[name] = _added(name, said)
            continue
        if rule.name in rules:
            raise wrong(f"expected the rule {rule.name} once; found it also as {quoted(name)}", "rules", name)
        if (
            isinstance(said, AddedRule)
            or callable(said)
            or (isinstance(said, Mapping) and {"signal", "check"} & set(said))
        ):
            raise wrong(
                f"{quoted(name)} is a rule of the table; expected another name for a rule that is added", "rules", name
            )
        rules[rule.name], its_limits = _tuned(rule, name, said)
        limits |= its_limits
    return rules, limits


def none_can_open(rules: Mapping[str, RuleSetting], agreeing_families: int) -> bool:
    """Is there no rule left that could open an alert: none added, of the table none but witnesses, and these of fewer families
    than have to agree?"""
    if any(isinstance(said, AddedRule) for said in rules.values()):
        return False
    left = [rule for rule in RULES if not isinstance(said := rules.get(rule.name), RuleOptions) or said.enabled]
    families = {rule.family for rule in left}
    return all(rule.weight == "witness" for rule in left) and len(families) < agreeing_families


def wrong(words: str, *place: str | int) -> PydanticCustomError:
    """An error of the options that says where below the alerts it is."""
    return PydanticCustomError("alert_rule", "{words}", {"words": words, "place": place})


def check_order(rule: Rule, limits: Limits) -> None:
    """Warnings come before errors: a warning's limit beyond the error's would never be met.

    Raises:
        PydanticCustomError: one lies beyond. Infinity, which switches warnings off, does not count.
    """
    for warning, error in rule.levels:
        warns, errs = getattr(limits, warning.option), getattr(limits, error.option)
        beyond = warns > errs if warning.direction == "above" else warns < errs
        if beyond and not math.isinf(warns):
            side = "at most" if warning.direction == "above" else "at least"
            raise wrong(
                f"expected {warning.option} of {side} {error.option}, since a warning comes before an error; found {warns:g} "
                f"and {errs:g}. Move both, or give the rule {rule.name} the level warning",
                warning.option if warning.option in limits.model_fields_set else error.option,
            )


def _tuned(rule: Rule, name: str, said: Any) -> tuple[RuleOptions, dict[str, Any]]:
    """What is said of a rule of the table, and which of its limits."""
    if isinstance(said, RuleOptions):
        return said, {}
    if isinstance(said, bool) or said in ("off", "on"):
        return RuleOptions(enabled=said is True or said == "on"), {}
    if not isinstance(said, Mapping):
        raise wrong(f"expected off, on or a mapping of its options; found {quoted(said)}", "rules", name)
    limits = {limit.option for limit in rule.limits} & set(said)
    _check_keys(said, [*RuleOptions.model_fields, *(limit.option for limit in rule.limits)], name)
    options = _validated(RuleOptions, name, {key: value for key, value in said.items() if key not in limits})
    return options, {option: said[option] for option in limits}


def _added(name: str, said: Any) -> AddedRule:
    if isinstance(said, AddedRule):
        return said
    if callable(said):
        return AddedRule(check=said)
    if not isinstance(said, Mapping) or not {"signal", "check"} & set(said):
        raise wrong(
            f"no rule {quoted(name)}{did_you_mean(name, rule_names())}. Expected a rule of the table (docs/alerts.md), "
            "or a signal with above or below, for a rule that is added",
            *("rules", name),
        )
    _check_keys(said, list(AddedRule.model_fields), name)
    return _validated(AddedRule, name, said)


def _check_keys(said: Mapping[Any, Any], names: list[str], name: str) -> None:
    for key in said:
        if key not in names:
            near = did_you_mean(str(key), names)
            raise wrong(f"no option {quoted(key)} there{near}. There are {', '.join(names)}", "rules", name, str(key))


def _validated(kind: type[_Setting], name: str, said: Mapping[Any, Any]) -> _Setting:
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise wrong(problem["msg"], "rules", name, *problem["loc"]) from None


def check_layers(rules: Mapping[str, RuleSetting], layers: int) -> None:
    """Refuse added rules of layers that a model does not have: they would never fire, and nobody would know.

    Raises:
        ConfigurationError: there is one.
    """
    for name, rule in rules.items():
        signal = rule.signal if isinstance(rule, AddedRule) else None
        place = None if signal is None else layer_of(signal)
        if place is None:
            continue
        last = layers - 1 if place.sequence != TO_THE_NEXT_LAYER else layers - 2  # the last layer has none to go to
        if place.layer > last:
            raise ConfigurationError(
                f"alerts.rules.{plain(name)}: expected a signal of one of the model's layers, 0 to {last}; "
                f"found {quoted(signal)}"
            )
