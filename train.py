"""Prune, distil, evaluate and export a network: `python train.py` with no arguments shows it on an embedded model.

    python train.py selection.ratio=0.3 criterion=magnitude       # any field or group of conf/ on the command line
    python train.py -m criterion=output_loss,magnitude,random selection.ratio=0.3,0.5,0.7
    python train.py experiment=pretrain_cifar10                    # a recipe of conf/experiment/
    python train.py --cfg job                                      # show the configuration and stop

The same command again resumes what was interrupted and does nothing where the run is finished.
"""

import os
import signal
import sys

# Bit-exact results on a GPU need a fixed workspace; it must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hydra
from omegaconf import DictConfig

from conf import schema, search_path
from experiments.engine import launch

schema.register()
search_path.register_own_files_first()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one job; returns its first measure, for sweepers that search."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open (a W&B run, a lock) is closed
    return launch.start_job(cfg)


if __name__ == "__main__":
    main()
