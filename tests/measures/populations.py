"""Exact effects and proxies of planted populations, of which some pairs are measured."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from align_audit.measures import control_variate as cv


def first(exact: np.ndarray, n: int) -> np.ndarray:
    """Only the first n pairs measured."""
    return np.where(np.arange(len(exact))[:, None] < n, exact, np.nan)


def numbers(result: cv.ControlVariate) -> tuple[float, float, float]:
    return result.interval.mean, result.interval.low, result.interval.high


@pytest.fixture(autouse=True)
def _no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
