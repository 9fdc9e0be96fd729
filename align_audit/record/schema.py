"""What every kind of record on disk has in common: frozen parts that survive JSON, a schema version, atomic writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from align_audit.errors import RecordError, counted, first_line, plain, quoted
from align_audit.files import write_atomically
from align_audit.record.units import In, Labels

_TOLD = 31
"""Lines of pydantic's own words that a message keeps: ten problems."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""From the values of one schema version, as parsed and not yet validated, to those of the next."""


class Part(BaseModel):
    """Part of a record: frozen, and nothing in it that is not declared."""

    # NaN and infinities are not JSON numbers; as strings they survive any JSON reader.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Labelled(Part):
    """A part with a field that says what the sequences beside it run along: each has a value for each label."""

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        markers = {name: field.metadata for name, field in type(self).model_fields.items()}
        for label, along in [
            (n, m.along) for n, of_field in markers.items() for m in of_field if isinstance(m, Labels)
        ]:
            expected = len(getattr(self, label))
            for name, of_field in markers.items():
                values = getattr(self, name)
                runs = any(isinstance(marker, In) and marker.along == along for marker in of_field)
                if runs and isinstance(values, list) and len(values) != expected:
                    raise ValueError(f"{name} has {len(values)} values, {label} {expected}: expected one for each")
        return self


class Stored(Part):
    """A record with a ``schema_version``: older ones are migrated and read, newer ones refused.

    A record that was migrated keeps the ``schema_version`` it was written with.

    Attributes:
        noun: what error messages call it.
        newest: the schema version that this align_audit writes.
        migrations: version → how its values become those of the next. A version after which fields were only added has
            none: they have defaults.
        telling: fields by which such a record is told from other JSON.
    """

    noun: ClassVar[str] = "record"
    newest: ClassVar[int]
    migrations: ClassVar[Mapping[int, Migration]] = {}
    telling: ClassVar[tuple[str, ...]] = ("schema_version",)

    def to_json(self) -> str:
        """One line of JSON; :meth:`from_json` gives an equal record back.

        What is no valid text (undecodable bytes of a file's name) is written with backslashes.
        """
        try:
            return self.model_dump_json()
        except PydanticSerializationError:
            return type(self).model_validate(_as_text(self.model_dump())).model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes, where: str | None = None) -> Self:
        """Parse one record.

        Args:
            where: what error messages say it was read from.

        Raises:
            RecordError: the text is no such record, or was written by a newer align_audit.
        """
        where = where or f"the {cls.noun}"
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where} is not JSON: {first_line(error)}") from None
        return cls.from_values(values, where)

    @classmethod
    def from_values(cls, values: Any, where: str) -> Self:
        """The record of values that were parsed from its JSON; ``where`` and errors as of :meth:`from_json`."""
        if not isinstance(values, dict) or not set(cls.telling) <= set(values):
            raise RecordError(f"{where} is not an align_audit {cls.noun}: no {' and '.join(cls.telling)} in it")
        version = values["schema_version"]
        if not isinstance(version, int) or isinstance(version, bool):
            raise RecordError(
                f"{where} is not a valid {cls.noun}: schema version {quoted(version)}; expected a whole number up to "
                f"{cls.newest}"
            )
        if version > cls.newest:
            raise RecordError(
                f"{where} has schema version {quoted(version)}; this align_audit reads up to {cls.newest}. "
                "Upgrade with `pip install --upgrade align-audit`."
            )
        if version < 1:
            raise RecordError(f"{where} is not a valid {cls.noun}: schema version {quoted(version)}; they begin at 1")
        try:
            for older in range(version, cls.newest):
                if older in cls.migrations:
                    values = cls.migrations[older](values)
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecordError(f"{where} is not a valid {cls.noun}: {_told(error)}") from None
        except Exception as error:  # values that no version ever wrote
            raise RecordError(f"{where} is not a valid {cls.noun}: {first_line(error)}") from error

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically: a reader sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            RecordError: the file cannot be read, or as :meth:`from_json`.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise RecordError(f"cannot read {plain(path)}: {first_line(error)}") from None
        return cls.from_json(text, where=plain(path))


def _told(error: ValidationError) -> str:
    """What pydantic says, of the first problems: names and values in it are foreign text."""
    lines = str(error).splitlines()
    rest = [f"  and {counted(len(lines) - _TOLD, 'more line')}"] if len(lines) > _TOLD else []
    return "\n".join([*(plain(line, 300) for line in lines[:_TOLD]), *rest])


def _as_text(value: Any) -> Any:
    """The same nested values, with valid text in place of what is none."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_text(key): _as_text(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(part) for part in value]
    return value
