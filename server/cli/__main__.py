"""`python -m server.cli` is the `lpa` command."""

from server.cli import main

main()
