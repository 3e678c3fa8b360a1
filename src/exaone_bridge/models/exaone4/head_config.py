"""The head of EXAONE 4.0's config.json <-> head config. No torch.

`architectures` names the head. What each field means is in Transformers' `modeling_layers.py`
(5.12.1): `GenericForSequenceClassification` and its siblings.
"""

from __future__ import annotations

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import non_negative_float, read_int
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_config import HeadConfig, HeadKind

__all__ = ["HEADS", "read_head", "write_head"]

HEADS = {
    "Exaone4ForSequenceClassification": HeadKind.SEQUENCE_CLASSIFICATION,
    "Exaone4ForTokenClassification": HeadKind.TOKEN_CLASSIFICATION,
    "Exaone4ForQuestionAnswering": HeadKind.QUESTION_ANSWERING,
}
_DROPOUT = 0.1  # where config.json names none


def read_head(hf_config: JSONMapping) -> HeadConfig | None:
    """Read the head that `architectures` names; None: the model is a language model.

    Raises:
        UnsupportedConfig: a field of the head is malformed.
    """
    names = hf_config.get("architectures")
    kind = HEADS.get(str(names[0])) if isinstance(names, list | tuple) and names else None
    match kind:
        case None:
            return None
        case HeadKind.QUESTION_ANSWERING:  # the start and the end of the answer
            return HeadConfig(kind=kind.value, num_labels=2)
        case HeadKind.TOKEN_CLASSIFICATION:
            labels = _num_labels(hf_config)
            return HeadConfig(kind=kind.value, num_labels=labels, dropout=_dropout(hf_config))
        case _:
            labels, padding = _num_labels(hf_config), _pad_token_id(hf_config)
            return HeadConfig(kind=kind.value, num_labels=labels, pad_token_id=padding)


def _num_labels(hf_config: JSONMapping) -> int:
    names = hf_config.get("id2label")
    if names is None:
        return read_int({"num_labels": 2, **hf_config}, "num_labels", least=1)
    if not isinstance(names, dict) or not names:
        raise UnsupportedConfig("id2label", got=names, wanted="an object with a name of each label")
    return len(names)


def _dropout(hf_config: JSONMapping) -> float:
    for key in ("classifier_dropout", "hidden_dropout"):
        if hf_config.get(key) is not None:
            return non_negative_float(hf_config, key)
    return _DROPOUT


def _pad_token_id(hf_config: JSONMapping) -> int | None:
    if hf_config.get("pad_token_id") is None:
        return None
    return read_int(hf_config, "pad_token_id", least=0)


def write_head(head: HeadConfig, before: HeadConfig | None) -> JSONObject:
    """Return the keys of config.json that differ from those of another head.

    A training run may change the dropout without changing the model, so it is not written.

    Args:
        head: of the model to be exported.
        before: what config.json describes now; None: a language model, or nothing.
    """
    found: JSONObject = {}
    if before is None or head.kind != before.kind:
        found["architectures"] = [name for name, kind in HEADS.items() if kind == head.kind]
    if before is None or head.num_labels != before.num_labels:
        labels = [f"LABEL_{label}" for label in range(head.num_labels)]
        found["id2label"] = {str(label): name for label, name in enumerate(labels)}
        found["label2id"] = {name: label for label, name in enumerate(labels)}
    if head.pools and (before is None or head.pad_token_id != before.pad_token_id):
        found["pad_token_id"] = head.pad_token_id
    return found
