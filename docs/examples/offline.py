"""Without a server: the whole machine in this process.

`LLM` starts attention and FFN workers as threads and runs a list of prompts as one batch. Its configuration is that of
`afd serve`; give it any layout to try. The model is the first argument, the default model without one.
"""

import sys

from afd_server.config import ServeConfig
from afd_server.llm import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "default"
config = ServeConfig(model=model, executor="local", ffn_workers=2, ffn_parallel="tp", max_model_len=512)

with LLM(config) as llm:
    prompts = ["The capital of France is", "The opposite of hot is"]
    for prompt, text in zip(prompts, llm.generate(prompts, max_tokens=8, temperature=0.0), strict=True):
        print(f"{prompt}{text}")
