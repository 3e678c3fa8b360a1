"""`cpu_runtime`: Megatron-Core's questions answered inside, and not a trace of it outside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.runtime.cpu import cpu_runtime

pytestmark = [
    pytest.mark.usefixtures("megatron_bridge"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU cpu_runtime changes nothing"),
]
CPU = torch.device("cpu")


def attributes() -> dict[str, Any]:
    """Every attribute of the modules that the context patches, not only of its table."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    modules: dict[str, Any] = {
        "torch": torch,
        "torch.cuda": torch.cuda,
        "torch.cuda.random": torch.cuda.random,
        "torch.distributed": torch.distributed,
        "torch.Tensor": torch.Tensor,
        "torch.nn.Module": torch.nn.Module,
        "random": random,
        "filesystem_async": filesystem_async,
    }
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in vars(module).items()
    }


def assert_nothing_is_patched(before: dict[str, Any]) -> None:
    after = attributes()
    assert before.keys() == after.keys()
    assert not [name for name in before if before[name] is not after[name]]
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3).cuda()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()


@pytest.fixture(autouse=True)
def restored(megatron_bridge: Any) -> Iterator[dict[str, Any]]:
    """Each test must leave everything as it found it, torch's random state apart."""
    before = attributes()
    yield before
    assert_nothing_is_patched(before)


# --- inside ---


def test_the_device_is_the_cpu() -> None:
    with cpu_runtime():
        assert torch.cuda.current_device() == CPU
        assert torch.zeros(3, device=torch.cuda.current_device()).device == CPU
        assert torch.cuda.set_device(3) is None
        assert torch.cuda.synchronize() is None and torch.cuda.synchronize(device=CPU) is None
        assert torch.cuda.empty_cache() is None
        assert not torch.cuda.is_available()  # code that checks for a GPU finds none


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "cuda:7", torch.device("cuda"), torch.device("cuda", 1)], ids=str
)
def test_tensors_made_on_cuda_are_on_the_cpu(device: Any) -> None:
    like = torch.ones(2)
    with cpu_runtime():
        made = [
            torch.zeros(3, device=device),
            torch.ones(3, device=device),
            torch.empty(3, device=device),
            torch.full((3,), 1.0, device=device),
            torch.tensor([1, 2], device=device),
            torch.arange(3, device=device),
            torch.randn(3, device=device),
            torch.as_tensor([1.0], device=device),
            torch.zeros_like(like, device=device),
            like.new_zeros(3, device=device),
            like.new_tensor([1.0], device=device),
            torch.nn.Linear(2, 2, device=device).weight,
        ]
        with torch.device(device):
            made.append(torch.zeros(3))
    assert {tensor.device for tensor in made} == {CPU}
    assert made[4].tolist() == [1, 2] and made[3].tolist() == [1.0] * 3


def test_moving_to_cuda_is_nothing() -> None:
    tensor, model = torch.arange(3.0), torch.nn.Linear(2, 2)
    weight = model.weight
    with cpu_runtime():
        for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)):
            assert tensor.to(device) is tensor
            assert tensor.to(device=device) is tensor
            assert tensor.to(device, non_blocking=True) is tensor
            assert model.to(device) is model and model.weight is weight and weight.device == CPU
        assert (
            tensor.cuda() is tensor
            and tensor.cuda(0) is tensor
            and tensor.cuda(non_blocking=True) is tensor
        )
        assert model.cuda() is model and model.cuda(0).weight is weight
        assert weight.cuda() is weight  # a parameter stays one


def test_what_to_does_beside_moving_is_still_done() -> None:
    tensor = torch.arange(3.0)
    with cpu_runtime():
        for moved in (
            tensor.to("cuda", torch.float64),
            tensor.to("cuda", dtype=torch.float64),
            tensor.to(device="cuda", dtype=torch.float64),
            tensor.to(torch.float64),
            tensor.to(torch.zeros(1, dtype=torch.float64)),
        ):
            assert (
                moved.dtype == torch.float64
                and moved.device == CPU
                and moved.tolist() == [0.0, 1.0, 2.0]
            )
        copied = tensor.to("cuda", copy=True)
        assert copied is not tensor and torch.equal(copied, tensor)


def test_other_devices_are_what_they_are() -> None:
    with cpu_runtime():
        assert torch.zeros(3, device="meta").is_meta and torch.zeros(3, device="cpu").device == CPU
        assert torch.zeros(3).to("meta").is_meta and torch.zeros(3).to(device="meta").is_meta
        assert torch.zeros(3, device=None).device == CPU
        assert torch.cat([torch.zeros(1), torch.ones(1)]).tolist() == [0.0, 1.0]


def test_gradients_flow_inside() -> None:
    weight = torch.ones(3, requires_grad=True)
    with cpu_runtime():
        (weight.cuda() * torch.arange(3.0, device="cuda")).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 1.0, 2.0]


def test_the_random_state_is_the_cpus() -> None:
    with cpu_runtime():
        torch.cuda.manual_seed(11)
        state, first = torch.cuda.get_rng_state(), torch.rand(4)
        assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(11)), first)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        torch.cuda.set_rng_state(state, device="cuda:0")
        assert torch.equal(torch.rand(4), first)
        assert torch.equal(torch.cuda.get_rng_state("cuda:0"), torch.get_rng_state())


def test_the_tracker_of_random_states_forks() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with cpu_runtime():
        torch.manual_seed(1)
        plain = torch.rand(6)
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("apart", 2)
        tracker.add("shared", 3)
        found = [torch.rand(3)]
        with tracker.fork("apart"):
            apart = torch.rand(4)
        with tracker.fork("shared"):
            shared = torch.rand(2)
        found.append(torch.rand(3))
        with tracker.fork("apart"):
            apart = torch.cat([apart, torch.rand(4)])
    assert torch.equal(
        torch.cat(found), plain
    )  # the stream outside the forks goes on as if there were none
    assert torch.equal(
        apart, torch.rand(8, generator=torch.Generator().manual_seed(2))
    )  # a fork goes on with its own
    assert torch.equal(shared, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_the_queue_of_a_checkpoint_forks() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async.get_write_results_queue
    with cpu_runtime():
        inside = filesystem_async.get_write_results_queue
        assert inside is not original and inside.func is original and inside.args == ("fork",)


def test_streams_are_nothing_to_wait_for() -> None:
    with cpu_runtime():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made = torch.ones(2, device="cuda")
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.current_stream().synchronize()
        assert made.tolist() == [1.0, 1.0]


# --- outside ---


def test_patched_inside_and_only_inside(restored: dict[str, Any]) -> None:
    """The other tests compare attributes afterwards; those that are patched must be among them."""
    with cpu_runtime():
        inside = attributes()
    changed = {name for name in restored if restored[name] is not inside[name]}
    assert changed >= {
        "torch.cuda.current_device",
        "torch.cuda.set_device",
        "torch.cuda.synchronize",
        "torch.cuda.get_rng_state",
        "torch.cuda.set_rng_state",
        "torch.cuda.manual_seed",
        "torch.cuda.empty_cache",
        "torch.cuda.Stream",
        "torch.cuda.current_stream",
        "torch.cuda.stream",
        "torch.distributed.init_process_group",
        "random._get_cuda_rng_state",
        "random._set_cuda_rng_state",
        "filesystem_async.get_write_results_queue",
    }
    assert restored.keys() == inside.keys()
    assert "torch.cuda.is_available" not in changed and not [
        name for name in changed if name.startswith("torch.Tensor")
    ]


def test_every_patch_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table grows to hold: each attribute that is patched is the original again."""
    patched: list[tuple[Any, str, Any]] = []
    patch_object = mock.patch.object

    def spy(target: Any, name: str, new: Any) -> Any:
        patched.append((target, name, getattr(target, name)))
        return patch_object(target, name, new)

    with monkeypatch.context() as patch:
        patch.setattr(mock.patch, "object", spy)
        context = cpu_runtime()
        context.__enter__()
    assert len(patched) >= 14 and all(
        getattr(target, name) is not value for target, name, value in patched
    )
    context.__exit__(None, None, None)
    assert not [name for target, name, value in patched if getattr(target, name) is not value]


def test_outside_nothing_is_patched(restored: dict[str, Any]) -> None:
    context = cpu_runtime()
    assert_nothing_is_patched(restored)  # making it is not entering it
    with context:
        assert torch.zeros(3, device="cuda").device == CPU
    assert_nothing_is_patched(restored)
    with cpu_runtime():  # and again
        assert torch.zeros(3, device="cuda").device == CPU
    assert_nothing_is_patched(restored)


def test_contexts_nest(restored: dict[str, Any]) -> None:
    with cpu_runtime():
        with cpu_runtime():
            assert (
                torch.zeros(3, device="cuda").device == CPU and torch.cuda.current_device() == CPU
            )
        assert torch.zeros(3, device="cuda").device == CPU and torch.cuda.current_device() == CPU
        assert torch.ones(1).cuda().device == CPU
    assert_nothing_is_patched(restored)


@pytest.mark.parametrize(
    "error", [ValueError("injected"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr
)
def test_an_exception_inside_goes_out_and_restores(
    restored: dict[str, Any], error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught, cpu_runtime(), cpu_runtime():
        raise error
    assert caught.value is error
    assert_nothing_is_patched(restored)


def test_a_failing_entry_restores(
    restored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(
            torch.cuda, "empty_cache"
        )  # the last of the answers has nothing to take the place of
        with pytest.raises(AttributeError), cpu_runtime():
            raise AssertionError("not reached")
    assert_nothing_is_patched(restored)


def test_as_a_decorator(restored: dict[str, Any]) -> None:
    @cpu_runtime()
    def device() -> torch.device:
        return torch.zeros(1, device="cuda").device

    assert device() == device() == CPU
    assert_nothing_is_patched(restored)


def test_where_cuda_is_available_nothing_changes(
    restored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    now = attributes()
    with cpu_runtime():
        assert_nothing_is_patched(now)
    monkeypatch.undo()


def test_it_is_the_packages_public_name() -> None:
    import exaone_bridge

    assert exaone_bridge.cpu_runtime is cpu_runtime


def test_other_threads_get_the_answers_of_torch_cuda() -> None:
    """The table acts on the process, but "cuda" is the CPU in one thread (TorchFunctionMode)."""
    found: list[Any] = []
    with cpu_runtime():
        thread = threading.Thread(target=lambda: found.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
    assert found == [CPU]
