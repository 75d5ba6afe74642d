"""The run folder and its records."""
