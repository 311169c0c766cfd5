"""A GPU's code on a machine without one: tensors that have a device and a shape, but no numbers.

Such a tensor raises where two devices meet, and where the host would have to wait for a number of
it. PyTorch's backward pass alone does not run with them. With a GPU, test_gpu.py shows more.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException,
                                           DynamicOutputShapeException, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode

from modules import NoiseScheduler
from utils.configs import SamplerConfig, make_scheduler_config

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: -m gpu"),
              pytest.mark.skipif(OLD, reason="tensors without numbers of older versions of torch "
                                 "need a driver"),
              pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]


class NoWaiting(TorchDispatchMode):
    """Forbids copies between host and GPU that the host waits for."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and args[0].device != result.device:
            assert kwargs.get("non_blocking"), f"the host waits for a copy of {args[0].shape}"
        return result


def move(module, function, recurse=True):
    """`nn.Module._apply`, which cannot put tensors without numbers in others' place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(function(parameter.detach()))
    return module


@pytest.fixture
def run_on_gpu(make_run, monkeypatch):
    """run_on_gpu(free, **changes) -> make_run's on an H100 with so many bytes free.

    Its backward pass leaves a gradient of zeros on each parameter.
    """
    def make(free: int = 2**36, **changes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))
        run = make_run(device=torch.device("cuda"), **changes)

        def backward(loss):
            assert loss.is_cuda and loss.requires_grad
            for parameter in run.net.parameters():
                parameter.grad = torch.zeros_like(parameter)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        return run

    real = NoiseScheduler(make_scheduler_config("cosine"))  # its numbers steer the host
    monkeypatch.setattr("train.NoiseScheduler", lambda config: real)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.nn.Module, "_apply", move)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield make


@pytest.mark.parametrize("free", [2**36, 0], ids=["set on the GPU", "set on the host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_stays_on_the_gpu_and_the_host_never_waits(run_on_gpu, dtype, free):
    run = run_on_gpu(free, dtype=dtype, accumulate=2)
    assert run.data["train"].images.is_cuda == bool(free)
    run.train_step()  # tables go to the GPU once
    with NoWaiting():
        norm = run.train_step()
    state = [tensor for values in run.optimizer.state.values() for tensor in values.values()]
    assert len(state) == 3 * len(list(run.net.parameters()))
    assert all(tensor.is_cuda for tensor in (
        norm, run.bad, run.loss_sum, *state, *run.net.parameters(),
        *run.ema.net.parameters()))
    with pytest.raises(DataDependentOutputException):
        run.check()  # here it waits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_and_validation_stay_on_the_gpu(run_on_gpu, dtype):
    run = run_on_gpu(dtype=dtype)
    assert run.sample(4, SamplerConfig(steps=3)).is_cuda
    with pytest.raises(DynamicOutputShapeException):  # the losses' quartiles, behind the GPU
        run.evaluate("validate")
