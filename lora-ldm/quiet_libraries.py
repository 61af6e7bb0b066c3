"""Keep the libraries' import-time warnings off the screen; import this before diffusers or
transformers.

xformers warns when its compiled part does not match the installed torch, transformers when
torchvision is missing. Neither says anything about the run: xformers is only used when asked for
(and then its own error is shown), and no image processor of transformers is used at all.
bitsandbytes misses, on some processors, a package that only speeds up 4-bit weights; this tree has
none. LyCORIS logs every setting to the screen unless its logger has a handler already; its warnings
are kept.
"""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("xformers", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)

_lycoris_warnings = logging.StreamHandler()
_lycoris_warnings.setLevel(logging.WARNING)
if not logging.getLogger("LyCORIS").handlers:
    logging.getLogger("LyCORIS").addHandler(_lycoris_warnings)
