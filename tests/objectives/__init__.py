"""Losses and the bound."""
