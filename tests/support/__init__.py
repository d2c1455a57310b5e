"""Fixtures, the Hub of the tests, reference tables."""
