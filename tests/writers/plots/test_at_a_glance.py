"""The two pictures that TensorBoard shows by default: legible at their size, limits drawn, findings in their titles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from matplotlib.text import Text

from align_audit.record.audit_record import AuditRecord
from align_audit.record.stored_records import heads_of
from align_audit.writers.plots.at_a_glance import drawable, health_at_a_glance, where_at_a_glance
from align_audit.writers.plots.canvas import RED, pixels
from align_audit.writers.standing import standing_at
from tests.helpers.make_record import make_record
from tests.helpers.screens import a_run, calm


def health_of(records: Sequence[AuditRecord]) -> Any:
    return health_at_a_glance(heads_of(records), standing_at(records[-1], records))


def texts(figure: Any) -> list[Text]:
    """All that is written on a figure."""
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def title(figure: Any) -> str:
    return " ".join(figure.get_suptitle().split())


@pytest.mark.parametrize(
    "figure",
    [
        health_of(a_run("ruined")),
        health_of(a_run("well")),
        health_of([calm(0)]),
        where_at_a_glance(make_record(100, layers=6)),
        where_at_a_glance(make_record(100, layers=48)),
        where_at_a_glance(make_record(100, layers=1)),
    ],
)
def test_few_words_large_letters_and_nothing_cut(figure: Any) -> None:
    assert pixels(figure).shape == (420, 640, 3)
    written = texts(figure)
    words = [word for text in written for word in text.get_text().split() if re.search("[A-Za-z]", word)]
    assert len(words) <= 15
    assert min(text.get_fontsize() for text in written) >= 13
    renderer = figure.canvas.get_renderer()
    names = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label) if text.get_text()]
    for text in (figure._suptitle, *names):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= 640 and box.y0 >= 0 and box.y1 <= 420, text.get_text()


def test_titles_state_the_finding_with_its_numbers() -> None:
    assert title(health_of(a_run("ruined"))) == "ERROR: KL 9.40 (limit 0.7), chosen −5.40"
    assert title(health_of(a_run("well"))) == "HEALTHY: KL 0.04 (limit 0.35), chosen +0.01"
    assert title(where_at_a_glance(make_record(100, layers=6))).startswith("Layers 2–4, ")
    said = title(where_at_a_glance(make_record(100, layers=12)))
    assert re.fullmatch(r"Peak at layer \d+, \d+ % of the gain, not localized", said)


def test_limits_are_drawn_and_the_axis_reaches_past_that_of_a_warning() -> None:
    for run in (a_run("ruined"), a_run("well")):
        kl, chosen = health_of(run).axes
        drawn = [
            sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--") for axes in (kl, chosen)
        ]
        assert drawn == [[0.35, 0.7], [-0.6, -0.25]]
        assert kl.get_ylim()[1] > 0.35
        assert chosen.get_ylim()[0] < -0.25


def test_red_is_of_errors() -> None:
    assert health_of(a_run("ruined"))._suptitle.get_color() == RED
    assert health_of(a_run("well"))._suptitle.get_color() != RED


def test_where_nothing_is_known_of_layers_there_is_nothing_to_draw() -> None:
    assert drawable(make_record(100, layers=2))
    assert not drawable(make_record(0, layers=2, progress=0.0))
    assert not drawable(make_record(100, layers=2, patching=False))
