"""Is the control-variate estimate unbiased, do its intervals cover, and what does it save? By simulation.

    python benchmarks/evidence/control_variate.py --json results.json      # the whole grid, about two minutes on one core
    python benchmarks/evidence/control_variate.py --repetitions 500        # a taste

Pairs are drawn anew in every repetition. Proxies A are normal, Student t with 5 degrees of freedom, or lognormal
(σ = 0.5, skewness 1.75; with --severe also σ = 1, skewness 6.2), standardized, plus 1. Exact effects are half the proxy
in size, E = ½ (A + rest), and the rest has the variance that makes the correlation ρ:

    linear   noise of the family of A
    curved   half the variance c (A² less what a line of A says of it), half noise
    scaled   noise times |A|

Printed per family and relation, over all n, N and ρ: bias in standard errors (and that of the same estimate whose slope
is fitted on all exact pairs, `naive`), coverage of nominal 95 %, the mean width relative to a normal-theory interval of
the equivalent plain pairs, 2 · 1.96 · sd / √n_eq, n_eq = 1 / ((1 − ρ²)/n + ρ²/N), and the coverage of the plain percentile
bootstrap of round(n_eq) exact pairs of the same family. Then audits that choose n by a pilot of 8 pairs (adaptive), and
two proxies: A and A′ = A + ½ z with z the standardized rest less noise: nine tenths of what a line of A leaves over in E is
seen by A′, as attribution further along the way between the models sees how the effect bends; and a third, 3 E and noise of
variance 1, as the margin shift is near the effects of high layers.
Monte Carlo error at 2,000 repetitions: 0.5 points of coverage, 0.022 of bias.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from align_audit.measures.control_variate import control_variate_means
from align_audit.measures.exact_pairs import exact_pairs_needed_safely
from align_audit.measures.exact_sample import MINIMUM_EXACT
from align_audit.measures.resampling import resample_indices

FAMILIES = ("normal", "t5", "lognormal")
RELATIONS = ("linear", "curved", "scaled")
EXACT = (8, 12, 16, 24, 32)
PAIRS = (64, 96, 128)
CORRELATIONS = (0.5, 0.8, 0.9, 0.99, 0.999)
SIGMA = {"lognormal": 0.5, "lognormal-severe": 1.0}
TRUTH = 0.5


def standardized(family: str, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws with mean 0 and variance 1."""
    if family == "normal":
        return generator.standard_normal(shape)
    if family == "t5":
        return generator.standard_t(5, shape) / np.sqrt(5 / 3)
    sigma = SIGMA[family]
    draws = np.exp(sigma * generator.standard_normal(shape))
    mean = np.exp(sigma**2 / 2)
    return (draws - mean) / (mean * np.sqrt(np.expm1(sigma**2)))


def skewness_and_kurtosis(family: str) -> tuple[float, float]:
    if family in ("normal", "t5"):
        return 0.0, 3.0 if family == "normal" else 9.0
    w = float(np.exp(SIGMA[family] ** 2))
    return (w + 2) * np.sqrt(w - 1), w**4 + 2 * w**3 + 3 * w**2 - 3


def draw(
    family: str, relation: str, rho: float, shape: tuple[int, ...], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects (mean ½) and proxies (mean 1) whose correlation is ``rho``."""
    proxy, rest = standardized(family, generator, shape), standardized(family, generator, shape)
    variance = 1 / rho**2 - 1
    if relation == "linear":
        rest *= np.sqrt(variance)
    elif relation == "scaled":
        rest *= np.sqrt(variance) * np.abs(proxy)
    else:
        skewness, kurtosis = skewness_and_kurtosis(family)
        bend = (proxy**2 - 1 - skewness * proxy) / np.sqrt(kurtosis - 1 - skewness**2)
        rest = np.sqrt(variance / 2) * (rest + bend)
    return 0.5 * (proxy + rest) + TRUTH, proxy + 1.0


def naive_means(exact: np.ndarray, proxy: np.ndarray, n: int) -> np.ndarray:
    """The estimate whose slope is fitted on the exact pairs it corrects."""
    y, d = exact[:n] - exact[:n].mean(axis=0), proxy[:n] - proxy[:n].mean(axis=0)
    slope = (y * d).sum(axis=0) / (d * d).sum(axis=0)
    return exact[:n].mean(axis=0) - slope * (proxy[:n].mean(axis=0) - proxy.mean(axis=0))


def plain_coverage(exact: np.ndarray, resamples: int = 300) -> float:
    """Coverage of percentile bootstrap intervals of the column means."""
    n = len(exact)
    counts = np.stack([np.bincount(row, minlength=n) for row in resample_indices(n, resamples, seed=0)])
    low, high = np.quantile(counts @ exact / n, [0.025, 0.975], axis=0)
    return float(((low <= TRUTH) & (high >= TRUTH)).mean())


def cell(family: str, relation: str, n: int, pairs: int, rho: float, repetitions: int) -> dict[str, Any]:
    """One point of the grid: repetitions are the layers of one call."""
    seed = zlib.crc32(f"{family} {relation} {n} {pairs} {rho}".encode())
    generator = np.random.default_rng(seed)
    exact, proxy = draw(family, relation, rho, (pairs, repetitions), generator)
    measured = exact.copy()
    measured[n:] = np.nan
    results = control_variate_means(measured, proxy)
    means = np.array([r.interval.mean for r in results])
    low, high = np.array([r.interval.low for r in results]), np.array([r.interval.high for r in results])
    naive = naive_means(exact, proxy, n)
    equivalent = 1 / ((1 - rho**2) / n + rho**2 / pairs)
    sd = 0.5 / rho
    error = means.std()
    return {
        "family": family,
        "relation": relation,
        "n": n,
        "pairs": pairs,
        "correlation": rho,
        "bias": float((means.mean() - TRUTH) / error),
        "naive_bias": float((naive.mean() - TRUTH) / naive.std()),
        "standard_error_ratio": float(error * np.sqrt(equivalent) / sd),
        "coverage": float(((low <= TRUTH) & (high >= TRUTH)).mean()),
        "width_ratio": float((high - low).mean() * np.sqrt(equivalent) / (2 * 1.96 * sd)),
        "plain_coverage": plain_coverage(exact[: round(equivalent)]),
        "equivalent_pairs": equivalent,
        "equivalent_pairs_reported": float(np.median([r.equivalent_pairs for r in results])),
    }


def adaptive(family: str, relation: str, pairs: int, rho: float, repetitions: int, pilot: int = 8) -> dict[str, Any]:
    """Audits that measure a pilot, choose n by its correlation (aim: half of all pairs), and keep the pilot pairs."""
    generator = np.random.default_rng(zlib.crc32(f"adaptive {family} {relation} {pairs} {rho}".encode()))
    exact, proxy = draw(family, relation, rho, (pairs, repetitions), generator)
    rows = np.arange(pairs)[:, None]
    first = control_variate_means(np.where(rows < pilot, exact, np.nan), proxy)
    n = np.array([exact_pairs_needed_safely(r.correlation, pilot, pairs, pairs / 2) for r in first])
    results = control_variate_means(np.where(rows < n, exact, np.nan), proxy)
    means = np.array([r.interval.mean for r in results])
    low, high = np.array([r.interval.low for r in results]), np.array([r.interval.high for r in results])
    return {
        "family": family,
        "relation": relation,
        "pairs": pairs,
        "correlation": rho,
        "mean_n": float(n.mean()),
        "bias": float((means.mean() - TRUTH) / means.std()),
        "coverage": float(((low <= TRUTH) & (high >= TRUTH)).mean()),
        "standard_error_ratio": float(means.std() * np.sqrt(pairs / 2) / (0.5 / rho)),
    }


def more_proxies(family: str, n: int, pairs: int, rho: float, repetitions: int) -> dict[str, Any]:
    """Effects that correlate with one proxy by ``rho``; a second explains nine tenths of its rest, a third is near them."""
    generator = np.random.default_rng(zlib.crc32(f"two {family} {n} {pairs} {rho}".encode()))
    shape = (pairs, repetitions)
    one, rest, noise, other = (standardized(family, generator, shape) for _ in range(4))
    exact = 0.5 * (one + np.sqrt(1 / rho**2 - 1) * (np.sqrt(0.9) * rest + np.sqrt(0.1) * noise)) + TRUTH
    near = 3 * exact + other
    proxies = np.stack([one + 1.0, one + 0.5 * rest + 1.0, near], axis=2)
    measured = np.where(np.arange(pairs)[:, None] < n, exact, np.nan)
    found = {}
    for name, count in (("one", 1), ("two", 2), ("three", 3)):
        # As an audit does, which leaves the margin shift out where there are too few exact pairs for its slope.
        used = min(count, 2) if n < MINIMUM_EXACT + 4 else count
        results = control_variate_means(measured, proxies[:, :, :used])
        means = np.array([r.interval.mean for r in results])
        low, high = np.array([r.interval.low for r in results]), np.array([r.interval.high for r in results])
        found[name] = {
            "bias": float((means.mean() - TRUTH) / means.std()),
            "coverage": float(((low <= TRUTH) & (high >= TRUTH)).mean()),
            "equivalent_pairs": float((0.5 / rho / means.std()) ** 2),
        }
    return {"family": family, "n": n, "pairs": pairs, "correlation": rho, **found}


def spread(cells: list[dict[str, Any]], key: str, form: str = "{:.3f}") -> str:
    values = [c[key] for c in cells]
    return f"{form.format(min(values))} … {form.format(max(values))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--severe", action="store_true", help="also lognormal effects with σ = 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    families = [*FAMILIES, "lognormal-severe"] if options.severe else list(FAMILIES)
    cells = [
        cell(*point, options.repetitions)
        for point in itertools.product(families, RELATIONS, EXACT, PAIRS, CORRELATIONS)
    ]
    print("range over n, N and ρ          |mean bias|  bias              naive bias        width / ideal     ", end="")
    print("se / ideal        coverage      below 92 %  above 98 %  plain bootstrap of n_eq")
    for family, relation in itertools.product(families, RELATIONS):
        here = [c for c in cells if (c["family"], c["relation"]) == (family, relation)]
        print(
            f"{family:>17} {relation:8}     {abs(np.mean([c['bias'] for c in here])):9.4f}  "
            f"{spread(here, 'bias', '{:+.3f}')}  {spread(here, 'naive_bias', '{:+.3f}')}  "
            f"{spread(here, 'width_ratio', '{:.2f}')}       {spread(here, 'standard_error_ratio', '{:.2f}')}       "
            f"{spread(here, 'coverage')}  {sum(c['coverage'] < 0.92 for c in here):5} /{len(here)} "
            f"{sum(c['coverage'] > 0.98 for c in here):5} /{len(here)}   {spread(here, 'plain_coverage')}"
        )
    print("\ncoverage by n (mean, least)        ", *(f"n={n:<12}" for n in EXACT))
    for family, relation in itertools.product(families, RELATIONS):
        row = []
        for n in EXACT:
            here = [c["coverage"] for c in cells if (c["family"], c["relation"], c["n"]) == (family, relation, n)]
            row.append(f"{np.mean(here):.3f} ({min(here):.3f})")
        print(f"{family:>17} {relation:8}          ", *(f"{r:14}" for r in row))
    chosen = [
        adaptive(family, relation, 96, rho, options.repetitions)
        for family, relation, rho in itertools.product(families, RELATIONS, (0.8, 0.9, 0.99))
    ]
    print("\nn chosen by a pilot of 8 of 96 pairs, aim 48     mean n    bias    coverage   se / se of 48 pairs")
    for c in chosen:
        print(
            f"{c['family']:>17} {c['relation']:8} ρ = {c['correlation']:<5}        {c['mean_n']:10.1f}  "
            f"{c['bias']:+.3f}   {c['coverage']:.3f}      {c['standard_error_ratio']:.2f}"
        )
    both = [
        more_proxies(family, n, 96, rho, options.repetitions)
        for family, n, rho in itertools.product(families, (10, 16, 24, 32), (0.8, 0.9))
    ]
    print(
        "\none proxy, two, three; of 96 pairs         bias                        coverage             worth plain pairs"
    )
    for c in both:
        bias, cover, worth = (
            "  ".join(form.format(c[name][key]) for name in ("one", "two", "three"))
            for key, form in (("bias", "{:+.3f}"), ("coverage", "{:.3f}"), ("equivalent_pairs", "{:5.1f}"))
        )
        print(f"{c['family']:>17} n = {c['n']:<3} ρ = {c['correlation']:<5}       {bias}      {cover}         {worth}")
    seconds = time.perf_counter() - started
    print(f"\n{len(cells)} points, {options.repetitions} repetitions each, {seconds:.0f} s")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "repetitions": options.repetitions,
                    "seconds": seconds,
                    "grid": cells,
                    "adaptive": chosen,
                    "more": both,
                }
            )
        )


if __name__ == "__main__":
    main()
