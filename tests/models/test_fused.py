"""Fused norms and SwiGLU: where they are used, and that they compute the same."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.conftest import ROOT
from vlm_sapo.models import fused
from vlm_sapo.models.loading import load_vlm

FUSED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
needs_liger = pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None, reason="liger-kernel and Triton"
)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_where_they_are_used(monkeypatch, installed, gpu):
    monkeypatch.setattr(fused, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert not fused.should_fuse(False)
    assert fused.should_fuse(None) == (installed and gpu)
    if installed and gpu:
        assert fused.should_fuse(True)
    else:
        with pytest.raises(
            ValueError,
            match=r"model.fused \(true\) must .*" + ("GPU" if installed else "install the extra fused"),
        ):
            fused.should_fuse(True)


@pytest.mark.parametrize("family", FUSED)
def test_the_families_modules_are_the_ones_that_can_be_fused(model_folder, family):
    """Another version of transformers may call or build them otherwise."""
    vlm = load_vlm(str(model_folder(family)))
    modules = list(vlm.model.model.language_model.modules())
    norms = [item for item in modules if type(item).__name__ in fused.NORMS]
    assert len(norms) == sum(type(item).__name__.endswith("RMSNorm") for item in modules) >= 5
    for norm in norms:
        states = torch.randn(3, len(norm.weight))
        scaled = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        assert torch.allclose(norm(states), norm.weight * scaled, atol=1e-6)
    for mlp in (item for item in modules if type(item).__name__ in fused.MLPS):
        states = torch.randn(3, mlp.hidden_size)
        expected = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(states)) * mlp.up_proj(states))
        assert torch.allclose(mlp(states), expected, atol=1e-6)
    dense = [item for item in modules if type(item).__name__.endswith("MLP")]
    assert all(type(item).__name__ in fused.MLPS for item in dense) and (dense or "moe" in family)


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("family", FUSED)
def test_they_compute_the_same(model_folder, family):
    """With Triton's interpreter, in a process of its own: Triton reads the setting when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.fused_check", str(model_folder(family))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    kinds = set(result["kinds"])
    assert result["fused"] >= 5 and "LigerRMSNorm" in kinds and not kinds & {*fused.NORMS, *fused.MLPS}
    assert ("LigerSwiGLUMLP" in kinds) == ("moe" not in family)
    assert result["logprobs"] < 1e-5 and result["gradients"] < 1e-5
