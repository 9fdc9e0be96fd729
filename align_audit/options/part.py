"""What all parts of a configuration have in common: which options there are, and how a wrong one is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from align_audit.options.refusals import Refused

if TYPE_CHECKING:  # type checkers are to see the fields, each with its type
    _Model = BaseModel
else:

    class _Refusing(type(BaseModel)):
        """A part that is made by itself is refused in the words in which the whole configuration is.

        Here and not in ``__init__``, which pydantic would call for the parts of a part too: places in the whole would be lost.
        """

        def __call__(cls, *values: Any, **options: Any) -> Any:
            try:
                return super().__call__(*values, **options)
            except ValidationError as error:
                raise Refused(error, cls) from None

    class _Model(BaseModel, metaclass=_Refusing):
        pass


class Part(_Model):
    """Some options. Making one raises :class:`~align_audit.errors.ConfigurationError` where they are not valid."""

    # As in records: an infinite limit is a word in JSON, so that what was stored equals what is asked for now.
    # What was found is said by ``options.refusals``, which knows what is secret; pydantic's own words are not to quote it.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings", hide_input_in_errors=True
    )
