"""The command `python -m experiments.report`."""

from experiments.reporting.set_page import main

if __name__ == "__main__":
    main()
