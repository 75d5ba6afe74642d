"""The networks. They take plain arguments, never a config."""
