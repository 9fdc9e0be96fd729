"""A record's schema with plain dicts in place of its parts: it accepts the same values, in about half the time.

A log is validated whole when it is opened, and most of its records are looked at much later or never. What takes the time of
validation is the objects that it makes, one for every estimate; dicts take less, and are gone with the line.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from align_audit.record.schema import Labelled, Part


def plain_validator(record: type[Part], kept: tuple[type[Part], ...]) -> TypeAdapter[dict[str, Any]]:
    """What reads a record's JSON into a dict of its fields.

    Args:
        record: the kind of record.
        kept: kinds of parts that are made all the same, to be used as they are.

    Returns:
        Its ``validate_json`` raises pydantic's ``ValidationError`` where that of ``record`` does.
    """
    return TypeAdapter(_Plain(kept).dict_of(record))


class _Plain:
    """Annotations with dicts for parts; each kind of part is translated once."""

    def __init__(self, kept: tuple[type[Part], ...]) -> None:
        # The sequences of a labelled part are compared with each other, by a validator of the part itself.
        self._kept: tuple[type[Part], ...] = (*kept, Labelled)
        self._dicts: dict[type[Part], Any] = {}

    def dict_of(self, part: type[Part]) -> Any:
        if part not in self._dicts:
            fields = {
                name: annotation if info.is_required() else NotRequired[annotation]
                for name, info in part.model_fields.items()
                for annotation in [self._with(info.metadata, self.of(info.annotation))]
            }
            translated = TypedDict(part.__name__, fields)  # type: ignore[misc]
            self._dicts[part] = with_config(ConfigDict(extra="forbid"))(translated)
        return self._dicts[part]

    def of(self, annotation: Any) -> Any:
        origin, inner = get_origin(annotation), get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Part):
            return annotation if issubclass(annotation, self._kept) else self.dict_of(annotation)
        if origin is Annotated:
            return self._with(list(inner[1:]), self.of(inner[0]))
        if origin in (Union, UnionType):
            return Union[tuple(map(self.of, inner))]  # noqa: UP007
        if origin in (list, dict):
            return origin[tuple(map(self.of, inner))]
        return annotation

    @staticmethod
    def _with(metadata: list[Any], annotation: Any) -> Any:
        """An annotation with what stands beside it, such as bounds."""
        for beside in metadata:
            annotation = Annotated[annotation, beside]
        return annotation
