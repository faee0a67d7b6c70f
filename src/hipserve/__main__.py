"""`python -m hipserve`: the command."""

from hipserve.cli.main import main

if __name__ == "__main__":
    main()
