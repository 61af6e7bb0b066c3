"""Makes torchvision's transforms importable beside a torch that its kernels were not built for.

Its Python code registers rules for operators; each one that is missing is declared, without a
kernel: the transforms of the training scripts use none of them."""

import re
import sys

import torch

_declared = torch.library.Library("torchvision", "DEF")


def import_torchvision() -> None:
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _declared.define(f"{missing.group(1)}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
