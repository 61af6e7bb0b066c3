"""Keep library warnings that say nothing about the run off the screen; import before transformers.

Warnings of this project's own, and errors of any library, are not touched."""

import logging
import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Paging moves optimizer states between GPU and CPU memory; on a CPU they are there already.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
warnings.filterwarnings("ignore", message=".*torch.cpu.amp.*", category=FutureWarning)
warnings.filterwarnings("ignore", message="Could not find a config file in")
# PEFT and TRL ask under the older names.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")
_KERNELS = "bitsandbytes.backends.cpu.ops"  # "Failed to load CPU gemm_4bit_forward": it does without
for name in ("torch.distributed", "torch.utils.cpp_extension", "bitsandbytes", _KERNELS, "huggingface_hub"):
    logging.getLogger(name).setLevel(logging.ERROR)
