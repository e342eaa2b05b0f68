"""The bounds in pyproject.toml are what the code works with: names and arguments that it uses of torch,
transformers and vLLM, against the oldest and the newest version allowed, or the installed one."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.conftest import FAMILIES, ROOT
from tests.versions import Sources, fits, keywords_of, problems, uses
from vlm_sapo.models.attention import prefix_attention, vision_attention
from vlm_sapo.models.families import FAMILIES as TABLE
from vlm_sapo.models.linear import CACHE_ARGUMENTS, ForkedState

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    text.partition(">=")[0].partition("[")[0]: text
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["vllm"]]
}
DOWNLOAD_SECONDS = 240
TORCH = {
    "torch.distributed:init_process_group": "backend timeout store rank world_size device_id",
    "torch.distributed.tensor:DTensor.from_local": "device_mesh placements run_check shape stride",
    "torch.distributed.fsdp:FSDPModule.unshard": "",
    "torch.distributed.fsdp:FSDPModule.reshard": "",
    "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor": "factor",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms": "enable",
    "torch.distributed.fsdp:FSDPModule.set_reshard_after_forward": "reshard_after_forward recurse",
    "torch.optim:AdamW": "lr betas weight_decay fused",
    "torch.cuda:get_device_capability": "device",
    "torch.utils.deterministic:fill_uninitialized_memory": None,
    "torch:AcceleratorError": None,
    "torch:OutOfMemoryError": None,
}
"""What the code uses of torch beside calls of imported names, and the arguments it gives."""
FLASH = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
    "return_debug_mask scale",
    "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k "
    "dropout_p is_causal rng_state unused scale",
}
"""The operations' first arguments, in their order, and `scale`."""
HUB = {
    "whoami": "",
    "create_repo": "private exist_ok",
    "auth_check": "write",
    "list_repo_files": "",
    "repo_info": "",
    "upload_folder": "repo_id folder_path commit_message delete_patterns",
}
"""Methods of huggingface_hub's HfApi, and the arguments by name."""
VLLM = {
    "vllm.entrypoints.llm:LLM.generate": (2, "use_tqdm lora_request"),
    "vllm.entrypoints.llm:LLM.collective_rpc": (1, "kwargs"),
    "vllm.entrypoints.llm:LLM.sleep": (0, "level"),
    "vllm.entrypoints.llm:LLM.wake_up": (0, "tags"),
    "vllm.entrypoints.llm:LLM.reset_prefix_cache": (0, ""),
    "vllm.entrypoints.llm:LLM.reset_mm_cache": (0, ""),
    "vllm.v1.engine.llm_engine:LLMEngine.reset_encoder_cache": (0, ""),
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (0, "weights_iterator weights_path"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (0, "weights_iterator weights_path"),
}
"""Methods of vLLM that the code calls on an engine, with the number of values and the arguments by name. Read in
the wheels of 0.32.0 and 0.33.0 (`VLLM_FOLDER=FOLDER`, an unpacked wheel); 300 MB each, so not fetched here."""


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of a package that fits a requirement best. Skips the test where no index is in reach."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} could not be fetched in {DOWNLOAD_SECONDS} seconds")
    if done.returncode:
        pytest.skip(f"{requirement} could not be fetched: {done.stderr.strip().splitlines()[-1][:200]}")
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["lowest", "newest", "installed"])
def transformers(request, tmp_path_factory):
    requirement = REQUIREMENTS["transformers"]
    if request.param == "installed":
        return Sources.of_folder(Path(find_spec("transformers").origin).parent.parent, "transformers")
    wanted = requirement if request.param == "newest" else requirement.replace(">=", "==").partition(",")[0]
    return Sources.of_wheel(fetch(wanted, tmp_path_factory.mktemp("wheel")))


@pytest.mark.slow
def test_transformers_has_what_is_imported_and_takes_what_is_given(transformers):
    assert len(uses("transformers")) > 20
    assert problems(transformers, "transformers") == []


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["lowest", "newest"])
def test_huggingface_hub_has_what_the_code_uses(bound, tmp_path):
    requirement = REQUIREMENTS["huggingface-hub"]
    wanted = requirement if bound == "newest" else requirement.replace(">=", "==").partition(",")[0] + ".0"
    sources, wrong = Sources.of_wheel(fetch(wanted, tmp_path)), []
    for name, keywords in HUB.items():
        arguments = sources.methods("huggingface_hub.hf_api", "HfApi", name)
        if not any(fits(item, 0, frozenset(keywords.split())) for item in arguments):
            wrong.append(name)
    assert wrong + problems(sources, "huggingface_hub") == []


OTHER_TOWERS = {"lfm2_vl": ("siglip2",)}
"""Modules of towers that are no family's own."""


@pytest.mark.slow
def test_transformers_gives_attention_what_it_takes(transformers):
    """The calls of the attention interface in the families' modules; ours names what it needs of them."""
    for family in FAMILIES:
        languages = [name.removesuffix("_text") for name in TABLE[family].languages]
        modules = [family, *languages, *OTHER_TOWERS.get(family, ())]
        calls = [
            node
            for module in modules
            for node in ast.walk(
                ast.parse(transformers.text(f"transformers/models/{module}/modeling_{module}.py"))
            )
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "attention_interface"
        ]
        assert len(calls) >= 2, family
        for call in calls:
            values = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
            names = [*list(inspect.signature(prefix_attention).parameters)[: len(values)], *keywords_of(call)]
            assert {"module", "query", "key", "value", "attention_mask", "scaling", "dropout"} <= {*names}
    for function in (prefix_attention, vision_attention):
        assert list(inspect.signature(function).parameters)[:5] == [
            "module", "query", "key", "value", "attention_mask",
        ]  # fmt: skip


@pytest.mark.slow
def test_linear_attention_and_its_cache_are_called_as_before(transformers):
    """models/linear.py runs the layers with a cache layer of its own. With another argument the prompt would not
    be shared; the layout's tests passed with transformers 5.16.0, 5.20.0 and 5.24.0."""
    for family in (name for name in FAMILIES if name.startswith("qwen3_5")):
        module = f"transformers.models.{family}.modeling_{family}"
        layer = "".join(part.capitalize() for part in family.split("_")).replace("Qwen35", "Qwen3_5")
        [arguments] = transformers.methods(module, f"{layer}GatedDeltaNet", "forward")
        assert {item.arg for item in arguments.args} & {*CACHE_ARGUMENTS}
    for name, keywords in (("update_conv_state", "conv_kernel_size"), ("update_recurrent_state", "")):
        [arguments] = transformers.methods("transformers.cache_utils", "LinearAttentionLayer", name)
        assert fits(arguments, 2, frozenset(keywords.split()))
        assert inspect.signature(getattr(ForkedState, name)).parameters.keys() >= {
            item.arg for item in arguments.args
        }


@pytest.mark.parametrize("package", ["torch", "accelerate", "peft", "transformers", "huggingface_hub"])
def test_calls_fit_the_installed_version(package):
    """As Python itself binds them."""
    wrong = []
    for use in uses(package):
        value = getattr(import_module(use.module), use.name)
        try:
            parameters = inspect.signature(value).parameters.values() if use.called else ()
        except ValueError:  # compiled code doesn't tell them
            continue
        names = {item.name for item in parameters}
        if not use.keywords <= names and not any(item.kind is item.VAR_KEYWORD for item in parameters):
            wrong.append(f"{use.where}: {use.name} takes no {use.keywords - names}")
    assert wrong == []


@pytest.mark.parametrize("name", TORCH)
def test_torch_has_what_the_code_relies_on(name):
    module, _, path = name.partition(":")
    value = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    if TORCH[name]:
        assert {*TORCH[name].split()} <= inspect.signature(value).parameters.keys()


@pytest.mark.parametrize("name", FLASH)
def test_the_attention_kernels_arguments_are_in_this_order(name):
    arguments = [item.name for item in getattr(torch.ops.aten, name).default._schema.arguments]
    *positional, scale = FLASH[name].split()
    assert arguments[: len(positional)] == positional and scale in arguments


def test_vllm_has_the_methods_that_the_code_calls():
    folder = os.environ.get("VLLM_FOLDER") or (
        Path(find_spec("vllm").origin).parent.parent if find_spec("vllm") else None
    )
    if folder is None:
        pytest.skip("vLLM is not installed, and VLLM_FOLDER names no unpacked wheel")
    sources, wrong = Sources.of_folder(Path(folder), "vllm"), []
    for name, (positional, keywords) in VLLM.items():
        module, _, path = name.partition(":")
        signatures = sources.methods(module, *path.split("."))
        if not any(fits(item, positional, frozenset(keywords.split())) for item in signatures):
            wrong.append(name)
    assert wrong + problems(sources, "vllm") == []
