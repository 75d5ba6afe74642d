"""The subcommands of `mae-et` for detection and segmentation; see mae_et/commands."""
