"""Helpers that every other package uses: errors, files, randomness, pictures."""
