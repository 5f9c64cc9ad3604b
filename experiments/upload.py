"""The command `python -m experiments.upload`: logs finished runs to Weights & Biases that were made without it."""

from experiments.reporting.upload import main

if __name__ == "__main__":
    main()
