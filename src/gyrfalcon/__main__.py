"""`python -m gyrfalcon`: the same as the `gyrfalcon` command."""

from gyrfalcon.cli.main import main

if __name__ == "__main__":
    main()
