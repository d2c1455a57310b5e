"""Ablations: a plan of training runs that differ in some flags, their evaluation, and one table of them."""
