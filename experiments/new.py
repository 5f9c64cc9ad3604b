"""The command `python -m experiments.new`."""

from experiments.scaffold.command import main

if __name__ == "__main__":
    main()
