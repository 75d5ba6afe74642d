"""The config of a run: what the user asked for."""
