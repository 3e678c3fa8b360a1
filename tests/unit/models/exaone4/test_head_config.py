"""The head of EXAONE 4.0's config: read as Transformers reads it, and written back."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone4.config import read_hf_config, write_hf_config
from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.schema.model_config import HeadConfig
from tests.helpers.heads import ANSWER, FIELDS, LABELS, SEQUENCE, TOKEN

NAMES = {str(label): name for label, name in enumerate(LABELS)}


def config_of(architecture: str, **fields: Any) -> dict[str, Any]:
    return {**TINY["exaone4-1.2b"], "architectures": [architecture], **fields}


@pytest.mark.parametrize(
    ("config", "num_labels", "dropout", "pad_token_id"),
    [
        (config_of(SEQUENCE), 2, 0.0, 0),
        (config_of(SEQUENCE, id2label={"0": "reward"}, pad_token_id=None), 1, 0.0, None),
        (config_of(SEQUENCE, num_labels=3, classifier_dropout=0.5), 3, 0.0, 0),
        (config_of(TOKEN, id2label=NAMES), 5, 0.1, None),
        (config_of(TOKEN, hidden_dropout=0.3), 2, 0.3, None),
        (config_of(TOKEN, hidden_dropout=0.3, classifier_dropout=0.0), 2, 0.0, None),
        (config_of(ANSWER, id2label=NAMES), 2, 0.0, None),
    ],
)
def test_a_head_is_that_of_transformers(
    config: dict[str, Any], num_labels: int, dropout: float, pad_token_id: int | None
) -> None:
    """Names, shapes and dropout are those of the model that Transformers builds."""
    import torch
    import transformers

    model_config = read_hf_config(config)
    head = model_config.head
    assert head is not None and not model_config.tied
    assert (head.num_labels, head.dropout, head.pad_token_id) == (num_labels, dropout, pad_token_id)
    architecture = config["architectures"][0]
    fields = {key: value for key, value in config.items() if key != "sliding_window_pattern"}
    with torch.device("meta"):
        built = getattr(transformers, architecture)(
            transformers.Exaone4Config(**copy.deepcopy(fields))
        )
    shapes = {name: tuple(each.shape) for name, each in built.named_parameters()}
    model = EXAONE4.describe(config)
    assert model.hf_shapes == shapes
    assert getattr(built, "dropout", SimpleNamespace(p=0.0)).p == dropout


@pytest.mark.parametrize("architecture", FIELDS)
def test_config_round_trip(architecture: str) -> None:
    """Label names and tie_word_embeddings stay as they are; the provider's dropout is not saved."""
    source = config_of(architecture, **FIELDS[architecture])
    model_config = read_hf_config(source)
    written = write_hf_config(model_config, source)
    assert list(written.items()) == list(source.items())
    assert model_config.head is not None
    trained = dataclasses.replace(
        model_config, head=dataclasses.replace(model_config.head, dropout=0.25)
    )
    assert write_hf_config(trained, source) == source


@pytest.mark.parametrize("architecture", FIELDS)
def test_config_without_a_source_names_the_head(architecture: str) -> None:
    model_config = read_hf_config(config_of(architecture, **FIELDS[architecture]))
    written = write_hf_config(model_config, {})
    assert written["architectures"] == [architecture]
    again = read_hf_config(written).head
    assert again is not None and model_config.head is not None
    assert dataclasses.replace(again, dropout=0.0) == dataclasses.replace(
        model_config.head, dropout=0.0
    )


def test_another_number_of_labels_is_written_with_names() -> None:
    source = config_of(SEQUENCE, id2label={"0": "reward"}, label2id={"reward": 0})
    model_config = dataclasses.replace(
        read_hf_config(source),
        head=HeadConfig(kind="sequence_classification", num_labels=2, pad_token_id=7),
    )
    assert write_hf_config(model_config, source) == source | {
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "pad_token_id": 7,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {}}, "id2label is {}"),
        ({"id2label": [1]}, "id2label is \\[1\\]"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
    ],
)
def test_malformed_fields_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        read_hf_config(config_of(SEQUENCE, **fields))


def test_only_exaone4_has_heads() -> None:
    """Transformers 5.12.1 has none for the other families."""
    assert family_of([SEQUENCE], where="here") is EXAONE4
    for name in ("ExaoneMoeForSequenceClassification", "Ernie4_5ForTokenClassification"):
        with pytest.raises(UnsupportedConfig, match="Exaone4ForSequenceClassification"):
            family_of([name], where="here")


def test_an_output_layer_beside_a_head_is_unexpected() -> None:
    """Of a tied language model it is left out; a head's checkpoint has no use for one."""
    assert EXAONE4.describe(TINY["exaone4-1.2b"]).is_redundant("lm_head.weight")
    assert not EXAONE4.describe(config_of(SEQUENCE)).is_redundant("lm_head.weight")
