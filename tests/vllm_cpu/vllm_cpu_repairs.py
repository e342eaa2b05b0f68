"""Makes vLLM's CPU build usable beside a torch without CUDA. Copied into that environment by its set-up.

Two faults of the packages, neither of which a GPU has:

- torchvision's wheels on the package index are CUDA builds. Without their library it imports only where the two
  operators that it names at import are declared.
- vLLM packs linear layers for oneDNN when it loads them and not when it reloads them, so new weights never
  arrive.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
QNMS = "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
KEPT = []


def declare_operators() -> None:
    import torch

    if torch.version.cuda is None and not KEPT:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(NMS)
        library.define(QNMS)
        KEPT.append(library)  # what it declared goes with it


class Repairs(MetaPathFinder):
    """Runs a repair before `torchvision` is imported, and another after `vllm._custom_ops` is."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            declare_operators()
        if name != "vllm._custom_ops":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module._supports_onednn = False

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Repairs())
