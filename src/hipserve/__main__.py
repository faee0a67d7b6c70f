"""`python -m hipserve`: the command."""

from hipserve.cli.main import main

main()
