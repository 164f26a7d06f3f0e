"""`python -m flexperts`: the `flexperts` command."""

from flexperts.cli.main import main

if __name__ == "__main__":
    main()
