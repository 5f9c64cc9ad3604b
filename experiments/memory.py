"""The command `python -m experiments.memory`."""

from experiments.tools.memory import run

if __name__ == "__main__":
    run()
