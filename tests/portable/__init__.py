"""The scheduler, schedules, sampling and pipelines."""
