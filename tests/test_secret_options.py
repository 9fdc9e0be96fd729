"""Where alerts are posted to is a secret: it is in no stored options, no text and no error, and makes no other run."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_audit import AuditConfig
from align_audit.cli.options import settings
from align_audit.config import AlertConfig
from align_audit.errors import ConfigurationError
from align_audit.options.webhook import WebhookConfig

SECRET = "T000-B000-not-to-be-told"
URL = f"https://hooks.slack.com/services/{SECRET}"


def config(**options: Any) -> AuditConfig:
    webhook = {"url": URL, "headers": {"Authorization": f"Bearer {SECRET}"}, **options}
    return AuditConfig.from_dict({"alerts": {"webhook": webhook}})


def test_a_text_is_its_url() -> None:
    for given in (URL, {"url": URL}, WebhookConfig(url=URL)):  # type: ignore[arg-type]
        webhook = AuditConfig.from_dict({"alerts": {"webhook": given}}).alerts.webhook
        assert webhook is not None and webhook.url is not None
        assert webhook.url.get_secret_value() == URL
        assert (webhook.form, webhook.timeout_seconds, webhook.headers) == ("auto", 10.0, {})


def test_nothing_that_is_written_holds_it(tmp_path: Path) -> None:
    made = config(form="slack", timeout_seconds=3)
    made.to_yaml(tmp_path / "a.yaml")
    texts = [
        json.dumps(made.to_dict()),
        repr(made),
        str(made),
        (tmp_path / "a.yaml").read_text(),
        made.model_dump_json(),
    ]
    assert not [text for text in texts if SECRET in text]
    assert made.to_dict()["alerts"]["webhook"] == {"form": "slack", "timeout_seconds": 3.0}


def test_options_that_differ_in_it_alone_are_stored_alike() -> None:
    other = config(url="http://127.0.0.1:1/", headers={})
    assert other.to_dict() == config().to_dict()
    assert AuditConfig.from_dict(other.to_dict()).to_dict() == other.to_dict()
    assert other.to_dict() != AuditConfig().to_dict()


def test_the_command_line_reads_it_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"low_rank: {{ranks: [1, 2]}}\nalerts: {{webhook: '{URL}'}}\n")
    made = settings(tmp_path / "a.yaml", 8, None, low_rank={"layers": "all"})
    assert made.alerts.webhook is not None and made.alerts.webhook.url is not None
    assert made.alerts.webhook.url.get_secret_value() == URL
    assert (made.max_pairs, made.low_rank.ranks, made.low_rank.layers) == (8, (1, 2), "all")


def test_another_process_is_given_it() -> None:
    webhook = pickle.loads(pickle.dumps(config())).alerts.webhook
    assert webhook.url.get_secret_value() == URL


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"ftp://hooks.slack.com/{SECRET}", "begins with https:// or http://.* found the scheme 'ftp'"),
        (f"file:///{SECRET}", "found the scheme 'file'"),
        (f"hooks.slack.com/services/{SECRET}", "begins with https:// or http://.* found none"),
        (f"https:///{SECRET}", "names a host"),
        (f"https://host:port/{SECRET}", "host and port can be read"),
        (f"https://[::1/{SECRET}", "host and port can be read"),
        (f"https://me:{SECRET}@host/", "without a user or password"),
        (f"https://host/{SECRET} b", "without blanks"),
        (f"https://host/{SECRET}\r\nX: y", "without blanks"),
        (f"https://hôst/{SECRET}", "printable ASCII"),
        ("", "printable ASCII"),
    ],
)
def test_what_cannot_be_posted_to_is_refused_without_being_quoted(url: str, said: str) -> None:
    for given in (url, {"url": url}):
        with pytest.raises(ConfigurationError, match=rf"alerts\.webhook\.url: .*{said}") as raised:
            AuditConfig.from_dict({"alerts": {"webhook": given}})
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"webhook": {"url": [URL]}}, r"alerts\.webhook\.url: .*valid string"),
        ({"webhook": [URL]}, r"alerts\.webhook: "),
        (
            {"webhook": {"url": URL, "headers": {"a b": SECRET}}},
            r"alerts\.webhook\.headers: .*expected names of HTTP headers",
        ),
        (
            {"webhook": {"url": URL, "headers": {"A": f"{SECRET}\n"}}},
            r"headers: .*expected the header A to be of printable",
        ),
        ({"webhook": {"url": URL, "headers": {"A": [SECRET]}}}, r"alerts\.webhook\.headers\.A: .*valid string"),
        ({"webhook": {"url": URL, "headers": SECRET}}, r"alerts\.webhook\.headers: .*valid dictionary"),
        ({"webhook": {"url": URL, "form": "teams"}}, r"webhook\.form: .*'auto', 'json' or 'slack' \(found 'teams'\)"),
        ({"webhook": {"url": URL, "timeout_seconds": 0}}, r"webhook\.timeout_seconds: .*greater than 0 \(found 0\)"),
        ({"webhook": {"url": URL, "timeout_seconds": float("nan")}}, r"timeout_seconds: .*found nan"),
        (
            {"webhook": {"adress": URL}},
            r"unknown option 'alerts\.webhook\.adress'.*; .* url, form, timeout_seconds, headers",
        ),
        (URL, r"alerts: .*\(found 'https://…\)"),
        ([{"webhook": URL}], r"alerts: .*\(found \[\{'webhook…\)"),
    ],
)
def test_an_error_beside_it_does_not_quote_it(values: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as raised:
        AuditConfig.from_dict({"alerts": values})
    assert SECRET not in str(raised.value)


def test_no_error_of_a_part_alone_quotes_it(tmp_path: Path) -> None:
    """Whoever builds a part without the whole, and a YAML file that is none: nor the traceback behind the message."""
    tries: list[Callable[[], object]] = [
        lambda: WebhookConfig(url=f"htps://{SECRET}"),  # type: ignore[arg-type]
        lambda: WebhookConfig(url=URL, headers={"Authorization": f"Bearer {SECRET}\n"}),  # type: ignore[arg-type, dict-item]
        lambda: AlertConfig(webhook=f"htps://{SECRET}"),  # type: ignore[arg-type]
        lambda: AlertConfig(webhook={"url": URL, "adress": SECRET}),  # type: ignore[arg-type]
        lambda: AuditConfig.from_yaml(tmp_path / "a.yaml"),
    ]
    (tmp_path / "a.yaml").write_text(f"alerts: {{webhook: https://{SECRET}, a: b: c}}\n")
    for build in tries:
        with pytest.raises(Exception, match=r".") as caught:
            build()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
