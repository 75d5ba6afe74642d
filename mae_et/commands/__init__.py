"""The subcommands of `mae-et`: each module has `make_parser` and `main`; the first line of its docstring is its help."""
