"""Where configuration files are looked for: a user's own folder comes before the one of this repository."""

import sys
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from conf.schema import ROOT, ConfigError


class OwnFilesFirst(SearchPathPlugin):
    """Puts the folder of `--config-dir` before conf/; Hydra itself appends it, so that conf/ would win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
        if folder is not None and Path(folder).is_dir():  # Hydra refuses another one
            search_path.prepend("command-line", f"file://{Path(folder).absolute()}", anchor="main")


def register_own_files_first() -> None:
    """Have Hydra look into the folder of `--config-dir` first."""
    Plugins.instance().register(OwnFilesFirst)


def check_shadowed_files() -> None:
    """Raise ConfigError where a folder of `hydra.searchpath` has a file that conf/ has, too: Hydra takes conf/'s."""
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider.startswith("hydra.searchpath") and source.schema == "file":
            for name in list_shadowed(Path(source.path)):
                raise ConfigError(
                    f"hydra.searchpath: {source.path}/{name} has the name of a file of this project, which would be "
                    "used in its place; choose another name, or give the folder as --config-dir"
                )


def list_shadowed(folder: Path) -> list[str]:
    """Return the paths of the YAML files below a folder that are also below conf/."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return [path.as_posix() for path in files if (ROOT / "conf" / path).exists()]
