"""Compares a model with and without fused kernels, by Triton's interpreter: `fused_check.py MODEL_DIR`.

Prints the number of fused modules and the largest differences of log-probs and of any gradient, relative to
the largest gradient.
"""

import json
import sys
from importlib import import_module

import triton.language

from tests.conftest import example, group_slice
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import SharedPrefix


class Scalar(float):
    """The interpreter gives kernels floats of Python, where compiled ones get Triton's."""

    def to(self, dtype):
        return self


def run(folder: str, *, fused: bool):
    vlm = load_vlm(folder, gradient_checkpointing=True)
    if fused:
        vlm.fuse()
    for module in vlm.modules():
        if type(module).__name__ == "LigerRMSNorm":
            module.variance_epsilon, module.offset = Scalar(module.variance_epsilon), Scalar(module.offset)
    prompt = Encoder(vlm)(example(1, problem="Count."))
    scores = Pass(vlm)(SharedPrefix().inputs([group_slice(prompt, [[20, 30, 40, 2], [9, 8]])]))
    scores.logprobs.sum().backward()
    return vlm, scores.logprobs.detach()


def main() -> None:
    # Liger's is of libdevice, which the interpreter lacks; Triton's own is replaced while a kernel runs.
    import_module("liger_kernel.ops.rms_norm").rsqrt = lambda value: triton.language.rsqrt(value)
    for name in ("liger_kernel.transformers.swiglu", "liger_kernel.ops.swiglu"):
        import_module(name).float = Scalar
    plain, logprobs = run(sys.argv[1], fused=False)
    fused, again = run(sys.argv[1], fused=True)
    one, two = (dict(vlm.model.named_parameters()) for vlm in (plain, fused))
    assert list(one) == list(two)
    largest = max(float(item.grad.abs().max()) for item in one.values() if item.grad is not None)
    gaps = [
        float((one[name].grad - two[name].grad).abs().max()) for name in one if one[name].grad is not None
    ]
    result = {"fused": fused.fused_modules, "kinds": sorted({type(m).__name__ for m in fused.modules()})}
    print(
        json.dumps(
            result | {"logprobs": float((logprobs - again).abs().max()), "gradients": max(gaps) / largest}
        )
    )


if __name__ == "__main__":
    main()
