"""Errors, files, layout."""
