"""Keep the libraries' import-time warnings off the screen; import this before diffusers or transformers.

xformers warns when its compiled part does not match the installed torch, transformers when torchvision is missing.
Neither says anything about the run: xformers is only used when asked for (and then its own error is shown), and no
image processor of transformers is used at all.
"""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("xformers").setLevel(logging.ERROR)
