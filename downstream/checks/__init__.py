"""Checks of configs, annotations and masks before a run."""
