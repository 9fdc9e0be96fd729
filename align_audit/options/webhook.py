"""Where alerts are posted to: options that are secret, checked without being quoted, and kept out of every message."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from align_audit.errors import plain
from align_audit.options.part import Part


class WebhookConfig(Part):
    """Where alerts are posted to (``align_audit.writers.webhook``). A text alone is its ``url``.

    ``url`` and ``headers`` are secrets (who knows a Slack URL may post): neither is in what ``AuditConfig.to_dict`` and
    ``to_yaml`` give, nor in records, so that runs that differ in nothing else have the same options.
    """

    url: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """``https://…`` or ``http://…``. None: that of the environment variable ``ALIGN_AUDIT_WEBHOOK_URL``, which has to be set
    then on the process that writes."""
    form: Literal["auto", "json", "slack"] = "auto"
    """``json``: an object with everything that an alert holds. ``slack``: ``{"text": …}``, which Slack and Mattermost show.
    ``auto``: ``slack`` for hooks.slack.com, else ``json``."""
    timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    """For all tries of a message together, and for what is not yet posted when a run ends: training waits nowhere else."""
    headers: dict[str, SecretStr] = Field(default_factory=dict, exclude=True, repr=False)
    """Sent with each message, such as ``{"Authorization": "Bearer …"}``."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_its_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str | SecretStr) else value

    @field_validator("url")
    @classmethod
    def _goes_to_the_web(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            check_web_address(url.get_secret_value())
        return url

    @field_validator("headers")
    @classmethod
    def _fit_in_a_line(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, text in headers.items():
            if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) is None:
                raise ValueError('expected names of HTTP headers, such as "Authorization"')
            if re.fullmatch(r"[\t\x20-\x7e]*", text.get_secret_value()) is None:
                raise ValueError(f"expected the header {plain(name, 60)} to be of printable ASCII in one line")
        return headers


def check_web_address(url: str) -> None:
    """Refuse what cannot be posted to. The message quotes nothing of a URL but its scheme: it may be a secret.

    Raises:
        ValueError: it is no absolute http or https URL.
    """
    example = "such as https://hooks.slack.com/services/…"
    if re.fullmatch(r"[\x21-\x7e]+", url) is None:
        raise ValueError(
            f"expected a URL of printable ASCII without blanks, {example}; others are written %20 and so on"
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is no number raises
    except ValueError:
        raise ValueError(f"expected a URL whose host and port can be read, {example}") from None
    if parts.scheme not in ("http", "https"):
        scheme = f"the scheme {plain(parts.scheme, 20)!r}" if "://" in url else "none of these"
        raise ValueError(f"expected a URL that begins with https:// or http://, {example}; found {scheme}")
    if not host:
        raise ValueError(f"expected a URL that names a host, {example}; found none")
    if "@" in parts.netloc:
        raise ValueError(f"expected a URL without a user or password, {example}; headers may hold an Authorization")
