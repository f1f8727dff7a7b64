"""The `gyrfalcon` command, also as `python -m gyrfalcon`."""


def main() -> None:
    # Only here: every child process imports the main module once more, and needs no command line.
    from gyrfalcon.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
