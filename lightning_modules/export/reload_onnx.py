"""Opens an ONNX export with onnxruntime alone. Arguments are {batch: {input: array}}, outputs {batch: array}."""

import reload_common

folder, batches, threads, _ = reload_common.read_command("np", absent=("torch",))
import onnxruntime  # noqa: E402  only now is torch out of its reach

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
reload_common.write_outputs({batch: session.run(["output"], inputs)[0] for batch, inputs in batches.items()})
