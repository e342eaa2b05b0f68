"""Functions of the user's that ask for what there is not, or return something else."""

import pytest
import torch

from vlm_sapo.algo.objectives import TokenTensors
from vlm_sapo.config.rollout import OwnEngineConfig
from vlm_sapo.config.schema import AlgoConfig
from vlm_sapo.rollout.build import build_engine
from vlm_sapo.training.loss import OwnAdvantage, build_loss

HERE = "tests.training.test_own_functions"


def towards_reference(log_ratio, advantage, reference):
    return -log_ratio.exp() * advantage + reference


def with_prepared(log_ratio, prepared):
    return log_ratio * prepared


def either(log_ratio, advantage, reference=None):
    return -log_ratio.exp() * advantage


def one_number(log_ratio, advantage):
    return -(log_ratio.exp() * advantage).mean()


def one_token_more(log_ratio):
    return torch.nn.functional.pad(log_ratio, (0, 1))


def no_tensor(log_ratio):
    return log_ratio.tolist()


def without_gradient(log_ratio):
    return log_ratio.detach()


def raises(log_ratio):
    return log_ratio + {}["nothing"]


def misspelt(log_ratio, advantges):
    return log_ratio


def out_of_memory(log_ratio):
    raise torch.OutOfMemoryError("full")


def out_of_cublas_memory(log_ratio):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def raising_advantage(batch):
    raise RuntimeError("not today")


def shaped(losses, mask, *, num_tokens, shape=None):
    """What an own reduction may and may not return."""
    total = torch.where(mask, losses, 0.0).sum() / num_tokens
    return {None: total, "rows": losses.sum(-1), "number": float(total), "cut": total.detach()}[shape]


def no_engine(needs):
    return object()


def loss_of(name: str, **fields):
    return build_loss(
        AlgoConfig(objective={"type": "own", "function": f"{HERE}:{name}"}, **fields), max_tokens=8
    )


def test_an_objective_is_told_what_it_would_not_get():
    with pytest.raises(ValueError, match=r"must not ask for reference, .* set algo.kl above 0"):
        loss_of("towards_reference")
    with pytest.raises(ValueError, match=r"must not ask for prepared, .* a method prepare"):
        loss_of("with_prepared")
    assert "reference" in loss_of("towards_reference", kl=0.1).objective.names
    assert "reference" in loss_of("either").objective.names


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("one_number", r"must return a tensor \[2, 3\], the loss of each token; it returned one \[\]"),
        ("one_token_more", r"it returned one \[2, 4\]"),
        ("no_tensor", "it returned list"),
        ("without_gradient", "must return losses that depend on logprobs"),
    ],
)
def test_what_an_objective_must_not_return(name, sentence):
    logprobs = torch.zeros(2, 3, requires_grad=True)
    tensors = TokenTensors(logprobs, torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=sentence):
        loss_of(name).objective(tensors)


TENSORS = TokenTensors(
    torch.zeros(2, 3, requires_grad=True),
    torch.zeros(2, 3),
    torch.ones(2, 3),
    torch.ones(2, 3, dtype=torch.bool),
)


def test_what_an_own_function_raises_ends_with_its_field():
    with pytest.raises(ValueError) as error:
        loss_of("raises").objective(TENSORS)
    first, *_, last = str(error.value).splitlines()
    assert first.startswith("Traceback")
    assert last == f"algo.objective.function ({HERE}:raises) failed: KeyError: 'nothing'"
    with pytest.raises(ValueError, match=r"algo.advantage.function \(f\) failed: RuntimeError: not today$"):
        OwnAdvantage(raising_advantage, "f")(None)


def test_memory_that_runs_out_is_no_fault_of_the_function():
    with pytest.raises(torch.OutOfMemoryError):
        loss_of("out_of_memory").objective(TENSORS)
    with pytest.raises(RuntimeError, match="^CUDA error: CUBLAS_STATUS_ALLOC_FAILED"):
        loss_of("out_of_cublas_memory").objective(TENSORS)


def test_a_misspelt_parameter_is_corrected():
    with pytest.raises(ValueError, match=r"did you mean advantages\?"):
        loss_of("misspelt")
    section = {"type": "own", "function": f"{HERE}:shaped", "args": {"shap": "rows"}}
    with pytest.raises(ValueError, match=r"did you mean shape\?"):
        build_loss(AlgoConfig(reduction=section), max_tokens=8)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [("rows", r"it returned one \[2\]"), ("number", "it returned float"), ("cut", "depends on losses")],
)
def test_what_a_reduction_must_not_return(shape, sentence):
    losses, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    section = {"type": "own", "function": f"{HERE}:shaped"}
    right = build_loss(AlgoConfig(reduction=section), max_tokens=8).reduction
    assert right(losses, mask, 2, 6).item() == 1.0
    wrong = build_loss(AlgoConfig(reduction=section | {"args": {"shape": shape}}), max_tokens=8).reduction
    with pytest.raises(ValueError, match=rf"algo.reduction.function \(.*shaped\) must return .*{sentence}"):
        wrong(losses, mask, 2, 6)


def test_an_engine_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"no_engine\) must return an engine .* it returned a object"):
        build_engine(OwnEngineConfig(type="own", function=f"{HERE}:no_engine"), None)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
def test_own_advantages_may_have_any_type(kind):
    class TwoResponses:
        mask = torch.tensor([[True, True], [True, False]])

    weights = torch.ones(2, requires_grad=True)
    values = OwnAdvantage(lambda batch: torch.tensor([1, 0]).to(kind), "f")(TwoResponses())
    assert values.dtype == torch.float64 and values.tolist() == [[1, 1], [0, 0]]
    assert not OwnAdvantage(lambda batch: weights * 2, "f")(TwoResponses()).requires_grad
