"""Fast QLoRA fine-tuning on ordinary GPUs: the mechanisms behind five notebooks.

One idea a module; nothing is imported here, so that ``python3 -m helpers`` starts on a bare Python.
"""

__version__ = "0.1.0"
