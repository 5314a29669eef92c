"""Fast QLoRA fine-tuning on ordinary GPUs: the mechanisms behind five notebooks.

One idea a module; nothing of it is imported here, so that ``python3 -m helpers`` starts on a bare Python.
"""

import logging

__version__ = "0.1.0"

# When it is first imported, on a CPU, bitsandbytes names kernels that it can do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
