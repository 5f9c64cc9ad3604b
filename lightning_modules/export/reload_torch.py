"""Opens an export of an image classifier with the file that lies beside its weights."""

import sys

import reload_common
import torch

folder, arguments, threads, _ = reload_common.read_command()
torch.set_num_threads(threads)
sys.path.insert(0, folder)
from image_networks import load  # noqa: E402  the export's own file

with torch.inference_mode():
    reload_common.write_outputs({"output": load(folder).eval()(arguments["image"])})
