"""A model family, and the description of one model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from exaone_bridge.models import FAMILIES
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone45 import EXAONE45, EXAONE45_WITH_MTP
from exaone_bridge.schema import dtypes
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.param_mapping import HFTensor

MODELS = [(family, name) for family in FAMILIES for name in family.tiny]


@pytest.mark.parametrize(
    ("family", "name"), MODELS, ids=lambda value: getattr(value, "name", value)
)
def test_description_follows_from_the_config(family: ModelFamily, name: str) -> None:
    model = family.describe(family.tiny[name])
    assert model.config == family.read_hf_config(family.tiny[name])
    assert model.mappings == family.mappings(model.config)
    assert model.hf_shapes.keys() == model.hf_tensors.keys()
    assert model.hf_shapes == {
        tensor: each.shape(model.dims) for tensor, each in model.hf_tensors.items()
    }
    assert model.fp32_names == {
        tensor for tensor, each in model.hf_tensors.items() if each.dtype("bfloat16") == "float32"
    }
    assert set(model.aliases.values()) <= model.megatron_names
    passthrough = {tensor.name for tensor in model.passthrough_tensors}
    assert all(map(model.is_passthrough, passthrough))
    assert not any(map(model.is_passthrough, model.hf_shapes))
    without = family.describe(family.write_hf_config(family.without_passthrough(model.config), {}))
    assert without.passthrough_tensors == () and without.hf_shapes == model.hf_shapes


def test_optional_parts() -> None:
    dense, moe, vision = (
        family.describe(family.tiny[name]).config
        for family, name in ((EXAONE4, "exaone4"), (ERNIE45, "ernie45"), (EXAONE45, "exaone45"))
    )
    assert (dense.moe, dense.vision, dense.mtp) == (None, None, None)
    assert (dense.num_experts, dense.expert_ffn_size, dense.moe_layers) == (0, 0, ())
    assert moe.moe is not None and moe.mtp is not None and moe.vision is None
    assert (moe.num_experts, moe.expert_ffn_size, moe.moe_layers) == (8, 40, (1, 2, 3))
    assert moe.moe_layer_mask == (False, True, True, True)
    assert vision.vision is not None and vision.mtp is not None and vision.moe is None


def test_variant_with_multi_token_prediction() -> None:
    for provider, family in (
        (SimpleNamespace(mtp_num_layers=1), EXAONE45_WITH_MTP),
        (SimpleNamespace(mtp_num_layers=None), EXAONE45),
        (SimpleNamespace(), EXAONE45),
    ):
        assert EXAONE45.variant_for(provider) is family
        assert EXAONE4.variant_for(provider) is EXAONE4
    assert EXAONE45.variant_with(["embedding.weight", "mtp.layers.0.x"]) is EXAONE45_WITH_MTP
    assert EXAONE45.variant_with(["embedding.weight"]) is EXAONE45
    config = EXAONE45.tiny["exaone45"]
    without, built = EXAONE45.describe(config), EXAONE45_WITH_MTP.describe(config)
    passthrough = {tensor.name for tensor in without.passthrough_tensors}
    assert built.hf_shapes.keys() == without.hf_shapes.keys() | passthrough
    assert built.passthrough_tensors == ()


def test_dtypes() -> None:
    assert {name: dtypes.itemsize(name) for name in dtypes.MODEL_DTYPES} == {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
    }
    for config, safetensors in dtypes.SAFETENSORS_DTYPES.items():
        assert dtypes.CONFIG_DTYPES[safetensors] == config
        assert HFTensor("a", "H").dtype(config) == config
        assert HFTensor("a", "H", fp32=True).dtype(config) == "float32"
