"""Opens an export with transformers alone. Further argument: a text for its tokenizer, empty where it has none."""

import reload_common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, arguments, threads, (text,) = reload_common.read_command()
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = arguments["input_ids"]
with torch.inference_mode():
    outputs = {"output": model(**arguments, use_cache=False, return_dict=False)[0]}
    outputs["tokens"] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=model.config.pad_token_id or 0,
    )
if text:
    outputs["text"] = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
reload_common.write_outputs(outputs)
