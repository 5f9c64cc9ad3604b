"""What a job would see of its data, before it runs: python -m experiments.data data=mine

The arguments are those of train.py (`--config-dir`, `data.size=64`, `task=language`, ...). No network is loaded. The
page `runs/data/<name>.html` shows counts, sizes, classes, bad samples with reasons, held-out samples that are trained
on, and the first training samples as the training gets them. A summary is printed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from conf import checks, schema, search_path
from datamodules.bad_samples import TooManyBadSamples
from datamodules.readers.base import MissingData
from experiments.engine.artefacts import make_folder
from experiments.engine.identity import get_written_settings
from experiments.engine.inputs import build_data
from experiments.engine.measures import build_measures, list_unfit_measures, select_sample_measures
from experiments.inspection.page import write_data_page
from experiments.inspection.survey import survey_data


def inspect_data(cfg: DictConfig) -> Path:
    """Survey the data of a configuration, write its page, print the summary, and return the path of the page.

    Raises MissingData and ValueError for data that a job could not begin with.
    """
    data = build_data(cfg)
    name = str(cfg.data.get("name") or "data")
    survey = survey_data(data, name)
    survey.problems += list_unfit_evaluation(cfg, survey.shape)
    folder = Path(cfg.paths.runs) / "data"
    make_folder(folder, "paths.runs")
    settings = OmegaConf.to_yaml(OmegaConf.create(get_written_settings(cfg)["data"]))
    page = write_data_page(folder / f"{name}.html", survey, data.mel, settings)
    print(f"{survey.summarise()}\n\npage: {page}")
    return page


def list_unfit_evaluation(cfg: DictConfig, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield why a measure of samples cannot be taken of images of a shape, or may not fit them, as sentences."""
    try:
        measures = build_measures(cfg)
    except (MissingData, ValueError) as error:
        yield str(error)
        return
    size = cfg.evaluation.resize
    shape = shape if size is None else (shape[0], size, size)
    fitting = select_sample_measures(measures)
    for name, measure in list(fitting.items()):
        try:
            if hasattr(measure, "features"):
                measure.features.check(shape)
        except ValueError as error:
            yield f"evaluation.metrics.{name}: {error}"
            del fitting[name]
    yield from list_unfit_measures(cfg, dict(fitting))


@hydra.main(version_base="1.3", config_path="../../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    try:
        search_path.check_shadowed_files()
        checks.check_config(cfg)
        inspect_data(cfg)
    except (MissingData, TooManyBadSamples, ValueError) as error:
        sys.exit(f"data={cfg.data.get('name')}: {error}")


def run() -> None:
    """Compose the configuration from the command line, and inspect its data."""
    schema.register()
    search_path.register_own_files_first()
    main()
