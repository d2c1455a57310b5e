"""Fixtures, the Hub of the tests, reference tables."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
