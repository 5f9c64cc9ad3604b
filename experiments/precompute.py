"""The command `python -m experiments.precompute`."""

from experiments.tools.precompute import run

if __name__ == "__main__":
    run()
