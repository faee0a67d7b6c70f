"""An unmodified transformers model on HiP attention: its tokens and those of dense attention."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hipserve

hipserve.register()
path = sys.argv[1] if len(sys.argv) > 1 else "src/hipserve/models/acorn"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="hip", dtype=torch.float32)
model.config.hip = {"budget": 512, "refresh_interval": 1}  # saved and loaded with the model

turns = [
    {"role": "user", "content": "Read the text.\n\nThe secret code of the otter is 48213."},
    {"role": "user", "content": "What is the secret code of the otter?"},
]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(turns, **options)
cache = hipserve.HiPCache(model.config)  # pages: a decode step copies nothing
hip = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
model.set_attn_implementation("sdpa")
dense = model.generate(**inputs, max_new_tokens=24, do_sample=False)

print(tokenizer.decode(hip[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("the same tokens as dense attention:", torch.equal(hip, dense))
