"""The command `python -m experiments.dashboard`: a workspace and a report of Weights & Biases for a project."""

import sys

try:
    from experiments.reporting.workspace import main
except ModuleNotFoundError as error:
    if not str(error.name).startswith("wandb_workspaces"):
        raise
    sys.exit("this command needs wandb-workspaces: pip install -e '.[dashboard]'")

if __name__ == "__main__":
    main()
