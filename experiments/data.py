"""The command `python -m experiments.data`."""

from experiments.inspection.command import run

if __name__ == "__main__":
    run()
