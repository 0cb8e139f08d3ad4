"""Model directories on disk: where they come from, before anything is loaded.

A server starts from a Hugging Face directory (config.json, safetensors, tokenizer.json). This room finds one
(`locate`), makes one from a GGUF file (`convert`), makes a mixture of experts of a dense one (`upcycle`), and keeps the
model that the demo serves (`default_model`). All of it runs offline, in the command line's own process. Reading weights
into workers is `models/checkpoint.py`, not here.
"""
