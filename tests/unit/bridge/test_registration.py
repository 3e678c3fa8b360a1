"""The bridge that Megatron-Bridge looks up: after either import order, or another registration."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import exaone_bridge
from exaone_bridge.errors import RegistrationError
from exaone_bridge.models import FAMILIES
from tests.helpers.fresh import HAS_TE, IMPORT_GUARD, fresh

EXAONE4_BRIDGE = "exaone_bridge.bridge.exaone4.Exaone4Bridge"
_BRIDGES = {
    "exaone4": EXAONE4_BRIDGE,
    "exaone45": "exaone_bridge.bridge.exaone45.Exaone45Bridge",
    "exaone_moe": "exaone_bridge.bridge.exaone_moe.ExaoneMoeBridge",
    "ernie45": "exaone_bridge.bridge.ernie45.Ernie45Bridge",
}
BRIDGE_BY_ARCHITECTURE = {
    name: _BRIDGES[family.name] for family in FAMILIES for name in family.architectures
}

# --- fresh processes ---

HEAVY = ("torch", "megatron", "transformers", "safetensors", "numpy", "transformer_engine")

FOUND = """
import json, sys
import transformers
from megatron.bridge.models.conversion.model_bridge import get_model_bridge

def found(key):
    bridge = type(get_model_bridge(key))
    return f"{bridge.__module__}.{bridge.__qualname__}"
"""
REPORT = """
from megatron.core.extensions.transformer_engine import HAVE_TE
dynamic = type("Exaone4ForCausalLM", (), {})  # as AutoBridge makes it
result = {
    "class": found(transformers.Exaone4ForCausalLM),
    "name": found("Exaone4ForCausalLM"),
    "dynamic": found(dynamic),
    "llama": found(transformers.LlamaForCausalLM),
    "have_te": HAVE_TE,
    "te_modules": [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"],
}
"""
PRINT = 'print("RESULT" + json.dumps(result))\n'


def assert_registered(result: dict[str, Any]) -> None:
    assert [result[key] for key in ("class", "name", "dynamic")] == [EXAONE4_BRIDGE] * 3
    assert result["llama"].startswith("megatron.bridge.models.llama.")
    assert result["have_te"] is HAS_TE
    assert HAS_TE or result["te_modules"] == []


def test_import_of_the_package_imports_no_torch() -> None:
    result = fresh(
        textwrap.dedent("""
        import json, sys
        import exaone_bridge
        import exaone_bridge.models, exaone_bridge.errors
        exaone_bridge.__version__, exaone_bridge.register, exaone_bridge.supported
        modules = sorted({name.partition(".")[0] for name in sys.modules})
        print("RESULT" + json.dumps({"modules": modules}))
        """)
    )
    assert not set(HEAVY) & set(result["modules"]) and "exaone_bridge" in result["modules"]


def test_import_before_megatron_bridge_registers() -> None:
    assert_registered(
        fresh("import exaone_bridge\nimport megatron.bridge\n" + FOUND + REPORT + PRINT)
    )


@pytest.mark.slow
def test_import_after_megatron_bridge_replaces_its_bridge() -> None:
    before = "first = found(transformers.Exaone4ForCausalLM)\nimport exaone_bridge\n"
    after = 'result["first"] = first\n'
    result = fresh(
        IMPORT_GUARD + "import megatron.bridge\n" + FOUND + before + REPORT + after + PRINT
    )
    assert_registered(result)
    assert result["first"].startswith("megatron.bridge.models.")


# --- in this process ---


@pytest.fixture
def dispatch(megatron_bridge: Any) -> Iterator[Any]:
    """Return the module that looks bridges up; our bridges are registered again afterwards."""
    from megatron.bridge.models.conversion import model_bridge

    yield model_bridge
    exaone_bridge.register()
    assert set(exaone_bridge.supported()) == set(BRIDGE_BY_ARCHITECTURE)


def test_supported_returns_the_bridge_of_each_architecture(megatron_bridge: Any) -> None:
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge

    assert megatron_bridge == exaone_bridge.supported()
    assert megatron_bridge["Exaone4ForCausalLM"] is Exaone4Bridge
    assert {
        name: f"{bridge.__module__}.{bridge.__qualname__}"
        for name, bridge in megatron_bridge.items()
    } == BRIDGE_BY_ARCHITECTURE
    assert f"{Exaone4Bridge.__module__}.{Exaone4Bridge.__qualname__}" == EXAONE4_BRIDGE


def test_register_again_changes_nothing(dispatch: Any) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
    from megatron.bridge.utils import instantiate_utils

    load, save = PreTrainedCausalLM._load_tokenizer, AutoBridge.save_megatron_model
    before = exaone_bridge.supported()
    prefixes = set(instantiate_utils._ALLOWED_TARGET_PREFIXES)
    exaone_bridge.register()
    exaone_bridge.register()
    assert exaone_bridge.supported() == before
    assert PreTrainedCausalLM._load_tokenizer is load  # not wrapped once more
    assert AutoBridge.save_megatron_model is save
    assert prefixes == instantiate_utils._ALLOWED_TARGET_PREFIXES and "exaone_bridge." in prefixes


def test_lookup_by_class_and_by_name(dispatch: Any) -> None:
    import transformers

    from exaone_bridge.bridge.exaone4 import Exaone4Bridge

    dynamic = type("Exaone4ForCausalLM", (), {})
    for key in (transformers.Exaone4ForCausalLM, "Exaone4ForCausalLM", dynamic):
        assert type(dispatch.get_model_bridge(key)) is Exaone4Bridge


@pytest.mark.parametrize("by", ["class", "name"])
def test_supported_raises_if_another_bridge_was_registered(dispatch: Any, by: str) -> None:
    import transformers
    from megatron.core.models.gpt import GPTModel

    class OtherBridge(dispatch.MegatronModelBridge):
        def provider_bridge(self, hf_pretrained: Any) -> Any: ...
        def mapping_registry(self) -> Any: ...

    key = transformers.Exaone4ForCausalLM if by == "class" else "Exaone4ForCausalLM"
    try:
        dispatch.register_bridge_implementation(
            source=key, target=GPTModel, bridge_class=OtherBridge
        )
        with pytest.raises(RegistrationError) as raised:
            exaone_bridge.supported()
    finally:
        exaone_bridge.register()
    message = str(raised.value)
    assert type(raised.value) is RegistrationError and len(message.splitlines()) == 1
    assert (
        f"{OtherBridge.__module__}.{OtherBridge.__qualname__}" in message
        and EXAONE4_BRIDGE in message
    )
    assert repr(key) in message and "import exaone_bridge after" in message
    assert set(exaone_bridge.supported()) == set(BRIDGE_BY_ARCHITECTURE)


def test_register_raises_if_the_lookup_finds_another_bridge(
    dispatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge.models.llama.llama_bridge import LlamaBridge

    register = dispatch.register_bridge_implementation

    def register_another(*, source: Any, target: Any, bridge_class: Any) -> None:
        register(source=source, target=target, bridge_class=LlamaBridge)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "register_bridge_implementation", register_another)
        with pytest.raises(RegistrationError, match="LlamaBridge"):
            exaone_bridge.register()


def test_export_of_weights_uses_the_registered_bridge(dispatch: Any) -> None:
    """Megatron-Bridge looks the export up separately, by (architecture, Megatron-Core class)."""
    import transformers
    from megatron.core.models.gpt import GPTModel

    from exaone_bridge.bridge.exaone4 import Exaone4Bridge

    calls: list[object] = []

    def stream(self: Any, *_: Any, **__: Any) -> Iterator[Any]:
        calls.append(type(self))
        return iter(())

    original = Exaone4Bridge.stream_weights_megatron_to_hf
    Exaone4Bridge.stream_weights_megatron_to_hf = stream  # type: ignore[method-assign]
    try:
        for source in (transformers.Exaone4ForCausalLM, "Exaone4ForCausalLM"):
            key = source, object.__new__(GPTModel)
            list(dispatch.stream_weights_megatron_to_hf(key, [], object()))
    finally:
        Exaone4Bridge.stream_weights_megatron_to_hf = original  # type: ignore[method-assign]
    assert calls == [Exaone4Bridge] * 2


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_auto_bridge_uses_the_registered_bridge(
    megatron_bridge: Any, tiny: Callable[..., Path], name: str
) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.exaone4 import Exaone4Bridge

    folder = tiny(name)
    bridge = AutoBridge.from_hf_pretrained(folder)
    assert type(bridge._model_bridge) is Exaone4Bridge
    assert (
        type(AutoBridge.from_hf_config(bridge.hf_pretrained.config)._model_bridge) is Exaone4Bridge
    )
    assert AutoBridge.can_handle(folder)


def test_auto_bridge_lists_each_architecture_once(megatron_bridge: Any) -> None:
    from megatron.bridge import AutoBridge

    models = AutoBridge.list_supported_models()
    assert {name: models.count(name) for name in BRIDGE_BY_ARCHITECTURE} == dict.fromkeys(
        BRIDGE_BY_ARCHITECTURE, 1
    )


@pytest.mark.skipif(HAS_TE, reason="Transformer Engine is installed here")
def test_import_guard_leaves_no_stub_modules(megatron_bridge: Any) -> None:
    from megatron.bridge.peft import lora_layers
    from megatron.core.extensions.transformer_engine import HAVE_TE

    assert HAVE_TE is False
    assert not [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
    assert lora_layers.te.Linear is lora_layers.te.Linear  # the module keeps its stub


def test_package_raises_for_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = exaone_bridge.no_such_name
    for name in exaone_bridge.__all__:
        assert getattr(exaone_bridge, name)
        assert name in dir(exaone_bridge)
