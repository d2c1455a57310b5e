"""The app that a published model gets as its Space, and what it shares with the command: loading and sampling.

Its files, the portable ones and the keyed randomness are copied into each Space, where ddpm_hf is not installed.
"""
