"""`python -m adapterlab` is the same as the `adapterlab` command."""

from adapterlab.cli import main

main()
