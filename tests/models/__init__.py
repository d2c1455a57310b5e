"""Presets, UNets, trained weights."""
