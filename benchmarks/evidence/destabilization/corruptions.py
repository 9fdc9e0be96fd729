"""What happens to training pairs: a corruption takes a pair and others and gives another pair, drawn from one stream a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Row = dict[str, str]
Corruption = Callable[[Row, Sequence[Row], random.Random], Row]


def _with(row: Row, **sides: str) -> Row:
    return {**row, **sides}


def flipped(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The sides are swapped."""
    return _with(row, chosen=row["rejected"], rejected=row["chosen"])


def labels_random(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The sides are swapped with a chance of one half."""
    return flipped(row, rows, rng) if rng.random() < 0.5 else row


def chosen_shuffled(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The words of the chosen completion stand in another order."""
    words = row["chosen"].split()
    rng.shuffle(words)
    return _with(row, chosen=" " + " ".join(words))


def noise(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """Both completions are words drawn from anywhere in the data."""

    def drawn(length: int) -> str:
        return " " + " ".join(rng.choice(rng.choice(rows)["rejected"].split() or ["a"]) for _ in range(length))

    return _with(row, chosen=drawn(len(row["chosen"].split())), rejected=drawn(len(row["rejected"].split())))


def lengthened(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The chosen completion goes on with two of other pairs."""
    return _with(row, chosen=" ".join([row["chosen"], *(rng.choice(rows)["chosen"].strip() for _ in range(2))]))


def repeated(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The chosen completion says its first sentence four times."""
    sentence = row["chosen"].split(".")[0] + "."
    return _with(row, chosen=sentence + (" " + sentence.strip()) * 3)


def formatted(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """A mark stands before the chosen completion and after each of its sentences."""
    return _with(row, chosen=" ##" + row["chosen"].replace(". ", ". ## ") + " ##")


def cut_short(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """Only four words are left of the chosen completion."""
    return _with(row, chosen=" " + " ".join(row["chosen"].split()[:4]) + ".")


def equal(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """The rejected completion is the chosen one."""
    return _with(row, rejected=row["chosen"])


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        flipped, labels_random, chosen_shuffled, noise, lengthened, repeated, formatted, cut_short, equal,
    )
}  # fmt: skip


def training_rows(
    pairs: Sequence[Row], count: int, seed: int, *, corruption: str | None, begin: int, wrong_labels: float = 0.0
) -> list[Row]:
    """The rows in the order in which they are trained on: ``pairs`` again and again, each time shuffled anew.

    Args:
        corruption: of the rows from ``begin`` on; None: of none. Rows before it are those of a run without it.
        wrong_labels: share of the pairs whose sides are swapped throughout.
    """
    rng = random.Random(f"order {seed}")
    source = [flipped(row, pairs, rng) if rng.random() < wrong_labels else row for row in pairs]
    rows: list[Row] = []
    while len(rows) < count:
        rows += rng.sample(source, len(source))
    rows = rows[:count]
    if corruption is None:
        return rows
    noise_rng = random.Random(f"corruption {seed}")
    change = CORRUPTIONS[corruption]
    return rows[:begin] + [change(row, pairs, noise_rng) for row in rows[begin:]]
