"""The command line: `longgen plan`, and the other commands beside it, one module each."""

from longgen.cli.app import app, main

__all__ = ["app", "main"]
