"""``write``: the page of all stored runs, ``docs/replication.md``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from align_audit.record.audit_record import AuditRecord
from replication.claims import CLAIMS
from replication.criteria import Criterion, Judged
from replication.destabilized import first_alert, first_harm, told
from replication.figures import Figure, each_slice, gain_of_third, in_third, over_seeds, per_seed, share_of_layers
from replication.plan import FIRST, KINDS, LORA_RANK
from replication.stored import DATA, Runs, StoredRun, load

PAGE = Path(__file__).resolve().parents[3] / "docs" / "replication.md"
BEGIN = "<!-- measured: python benchmarks/evidence/replication write -->"
END = "<!-- end of measured -->"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--stored", "--data", dest="data", type=Path, default=DATA, help="folder of the stored runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page, whose measured part is replaced")


def main(options: argparse.Namespace) -> None:
    """Replace the measured part of the page, and leave the words about it.

    Raises:
        SystemExit: the page has no measured part.
    """
    text = (
        options.page.read_text(encoding="utf-8")
        if options.page.exists()
        else f"# The two papers, replicated\n\n{BEGIN}\n{END}\n"
    )
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(
            f"{options.page}: expected a part between {BEGIN!r} and {END!r}, found none; add these two lines"
        )
    page = f"{before}{BEGIN}\n\n" + "\n".join(measured(load(options.data))) + f"\n\n{END}{after}"
    options.page.write_text(page, encoding="utf-8")
    print(options.page)


def measured(setups: list[Runs]) -> Iterator[str]:
    """The lines of the measured part."""
    yield from verdicts(setups)
    yield ""
    yield from null_and_ruined(setups)
    for runs in setups:
        yield ""
        yield from setup_lines(runs)


def verdicts(setups: list[Runs]) -> Iterator[str]:
    """Every claim against every setup, in words."""
    names = [runs["healthy"][0].setup.name for runs in setups]
    yield "## Verdicts"
    yield ""
    yield f"| claim | | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for claim in CLAIMS:
        for how in ("stated", "allowed"):
            criterion: Criterion = getattr(claim, how)
            said = " | ".join(bold(criterion.judge(runs)) for runs in setups)
            title = f"{claim.paper}: {claim.words}" if how == "stated" else ""
            yield f"| {title} | {'as stated' if how == 'stated' else 'as controls allow'} | {said} |"


def null_and_ruined(setups: list[Runs]) -> Iterator[str]:
    """What an audit makes of runs in which nothing is to be learned, and of such as ruin their model."""
    yield "## Null and ruined runs"
    yield ""
    yield "| | localization claimed: null audits | healthy audits | error: ruined runs | at step (harm by) | usual runs |"
    yield "|---|---|---|---|---|---|"
    for runs in setups:
        name = runs["healthy"][0].setup.name
        audits = [audits_of(runs["null"]), audits_of(runs["healthy"])]
        claimed = [f"{sum(map(claims, each))} of {len(each)}" for each in audits]
        errors = [first_alert(run) for run in runs["ruined"]]
        steps = ["never" if first is None else str(first[1]) for first in errors]
        when = [f"{step} ({first_harm(run) or 'never'})" for run, step in zip(runs["ruined"], steps, strict=True)]
        usual = [first_alert(run) is not None for run in [*runs["healthy"], *runs["null"]]]
        told_of = f"{sum(first is not None for first in errors)} of {len(errors)}"
        yield f"| {name} | {' | '.join(claimed)} | {told_of} | {', '.join(when)} | {sum(usual)} of {len(usual)} |"


def audits_of(runs: list[StoredRun]) -> list[AuditRecord]:
    """All full audits of some runs."""
    return [record for run in runs for record in run.records]


def claims(record: AuditRecord) -> bool:
    """Does an audit claim a localization?"""
    return record.finding is not None and record.finding.localized


def bold(judged: Judged) -> str:
    """A verdict; what cannot be said is not bold."""
    return judged.verdict if judged.verdict == "cannot be said" else f"**{judged.verdict}**"


def setup_lines(runs: Runs) -> Iterator[str]:
    """One setup: how it was run, its figures, its thirds, and what its null and ruined runs show."""
    setup = runs["healthy"][0].setup
    everything = [run for of_kind in runs.values() for run in of_kind]
    yield f"## {setup.name}"
    yield ""
    yield " ".join(how_it_was_run(everything))
    yield ""
    yield "| claim | what is compared | figure (95 %) | verdict |"
    yield "|---|---|---|---|"
    for claim in CLAIMS:
        for how in ("stated", "allowed"):
            criterion: Criterion = getattr(claim, how)
            judged = criterion.judge(runs)
            title = f"{claim.paper}, as stated: {claim.words}" if how == "stated" else "as controls allow it"
            reason = f" ({judged.reason})" if judged.reason else ""
            yield f"| {title} | {criterion.sentence} | {said(judged.figure)} | {bold(judged)}{reason} |"
    yield ""
    yield from thirds(runs)
    yield ""
    yield from course(everything)
    yield ""
    yield from told_lines(runs)


def said(figure: Figure) -> str:
    """``0.42 [0.31, 0.55]``."""
    if figure.mean != figure.mean:
        return "not known"
    return f"{figure.mean:.3g} [{figure.low:.3g}, {figure.high:.3g}]"


def how_it_was_run(everything: list[StoredRun]) -> Iterator[str]:
    """The settings and what they took, in sentences."""
    run = everything[0]
    setup, layers = run.setup, run.last[0].provenance.num_layers
    trained = f"adapters of rank {LORA_RANK} on all linear modules" if setup.method == "lora" else "all weights"
    rates = f"a rate of {setup.learning_rate:g} (ruined: {setup.learning_rate * setup.ruin:g})"
    patched = "all patched" if setup.exact_pairs is None else f"`exact_pairs: {setup.exact_pairs}`"
    probed = "held-out" if setup.probed == "held-out" else "(trained on)"
    yield f"{layers} layers, {trained}, {setup.dtype}; {setup.steps} steps of {setup.batch} pairs at {rates}, β {setup.beta:g},"
    yield f"pairs of at most {setup.max_length} tokens; {setup.pairs} {probed} probe pairs a slice, {patched}, at most"
    of_transport = "" if setup.transport_rows == "auto" else f", {setup.transport_rows} in their transport"
    yield f"{setup.spinal_rows} token rows in traces{of_transport}; audited after"
    yield f"{', '.join(map(str, setup.audited))} steps."
    yield f"{', '.join(f'{sum(each.kind == kind for each in everything)} {kind}' for kind in KINDS)} runs:"
    training = [each.about["training"] for each in everything]
    audits = [spent for each in everything for spent in each.about["audits"].values()]
    minutes = [sum(spent[unit] for spent in part) / 60 for part, unit in (
        (training, "cpu_seconds"), (audits, "cpu_seconds"), ([*training, *audits], "seconds"),
    )]  # fmt: skip
    yield f"{minutes[0]:.1f} CPU minutes of training with its looks, {minutes[1]:.1f} of {len(audits)} full audits,"
    yield f"{minutes[2]:.1f} minutes by the clock."


def thirds(runs: Runs) -> Iterator[str]:
    """What each third of the layers adds to the shift, and how much of SPINAL's change lies there."""
    yield "| after the last step | early third | middle third | last third |"
    yield "|---|---|---|---|"
    gains = [said(each_slice(runs["healthy"], gain_in(part))) for part in (0, 1, 2)]
    yield f"| share of the shift that its layers add, healthy | {' | '.join(gains)} |"
    for part in ("contraction", "transport"):
        for kind in ("healthy", "null"):
            shares = [said(over_seeds(per_seed(runs[kind], change_in(part, wanted)))) for wanted in (0, 1, 2)]
            yield f"| share of the change of {part}, {kind} | {' | '.join(shares)} |"


def gain_in(wanted: int) -> Callable[[StoredRun, str], Figure]:
    """A run and slice → the gain of a third of the layers."""
    return lambda run, name: gain_of_third(run, name, wanted)


def change_in(part: str, wanted: int) -> Callable[[AuditRecord], float]:
    """A record → the share of the change of a part of the trace that lies in a third of the layers."""
    return lambda record: share_of_layers(record, part, in_third(wanted, record.provenance.num_layers))


def course(everything: list[StoredRun]) -> Iterator[str]:
    """What each run came to."""
    yield "| run | shift at the end, nats | tokens right, of the reference's | claimed | first alert | first error | harm |"
    yield "|---|---|---|---|---|---|---|"
    for run in everything:
        last = run.audit(FIRST, run.setup.audited[-1])
        claimed = sum(map(claims, run.records))
        right = last.margins.token_accuracy.mean / last.margins.reference_token_accuracy.mean
        harm = first_harm(run)
        cells = [
            f"{run.kind} {run.seed}", f"{last.margins.shift:.3g}", f"{right:.2f}", f"{claimed} of {len(run.records)} audits",
            alert_words(run, "any"), alert_words(run, "error"), "no" if harm is None else f"by step {harm}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def alert_words(run: StoredRun, level: str) -> str:
    """``step 8 (look 4, kl)``."""
    first = first_alert(run, level)
    return "none" if first is None else f"step {first[1]} (look {first[0]}, `{first[2]}`)"


def told_lines(runs: Runs) -> Iterator[str]:
    """Which numbers of SPINAL told of the ruined runs."""
    usual = [*runs["healthy"], *runs["null"]]
    if not runs["ruined"] or len(usual) < 3:
        return
    yield "| SPINAL's | ruined runs told of by the first audit with harm | healthy and null runs in which it speaks |"
    yield "|---|---|---|"
    for name, (in_time, false) in told(runs["ruined"], usual).items():
        yield f"| `{name}` | {sum(in_time)} of {len(in_time)} | {false} of {len(usual)} |"
