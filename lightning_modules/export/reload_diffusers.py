"""Opens an export with diffusers alone. Further arguments: the network's name in the pipeline, 1 to trust its code."""

import json
from pathlib import Path

import reload_common
import torch
from diffusers import DiffusionPipeline

folder, arguments, threads, (component, trusted) = reload_common.read_command()
torch.set_num_threads(threads)
index = json.loads((Path(folder) / "model_index.json").read_text())
absent = {name: None for name, value in index.items() if value == [None, None]}
options = {"trust_remote_code": trusted == "1", "low_cpu_mem_usage": False}
pipeline = DiffusionPipeline.from_pretrained(folder, **absent, **options)
with torch.inference_mode():
    output = getattr(pipeline, component).eval()(**arguments, return_dict=False)[0]
reload_common.write_outputs({"output": output})
