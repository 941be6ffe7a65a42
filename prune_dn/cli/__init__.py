"""The command line: one module per group of commands."""

from prune_dn.cli.app import main as main
