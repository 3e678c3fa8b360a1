"""Random damage of a header: the reader rejects, or agrees with safetensors."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from exaone_bridge.checkpoint.hf import headers
from exaone_bridge.checkpoint.hf.headers import read_file_header
from exaone_bridge.errors import CheckpointError
from tests.helpers.safetensors_files import (
    SINGLE,
    by_safetensors,
    by_us,
    entry,
    file_bytes,
)

SOUND = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry(0, 16, [2, 2]),
    "b😀": entry(16, 24, [4], "BF16"),
    "empty": entry(24, 24, [0, 3], "I8"),
    "scalar": entry(24, 32, [], "F64"),
}
AS_WRITTEN = file_bytes(json.dumps(SOUND, separators=(",", ":"), ensure_ascii=False).encode(), 32)
TOKENS = [
    *(
        "-0",
        "0",
        "8",
        "-1",
        "1e2",
        "1.0",
        "NaN",
        "Infinity",
        "true",
        "null",
        "{}",
        "[]",
        '"F32"',
        '"a.weight":1,',
    ),
    *(
        ",",
        ":",
        "{",
        "}",
        "[",
        "]",
        '"',
        " ",
        "\n",
        "\0",
        "\\",
        "\\u0061",
        "\\ud800",
        "\\udc00",
        str(2**63),
        str(2**64),
    ),
    *('"__metadata__":{},', '"x":', '"dtype":"U8",', "é", "\ufeff", "9" * 30),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 32, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, -1]),
    st.floats(),
    st.sampled_from(["F32", "BF16", "I8", "F64", "F4", "C64", "", "\ud800", "é"]),
    st.lists(st.integers(-1, 40), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), st.integers(-1, 40)),
)


@st.composite
def changed_values(draw: st.DrawFn) -> bytes:
    """SOUND with some values, somewhere in it, removed, replaced, copied or moved."""
    header = json.loads(json.dumps(SOUND))
    for _ in range(draw(st.integers(1, 4))):
        at: Any = header
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.integers(0, 4)):
                at = at[key]
                continue
            match draw(st.sampled_from(["replace", "remove", "rename", "copy"])):
                case "replace":
                    at[key] = draw(LEAVES)
                case "remove":
                    del at[key]
                case "rename" if isinstance(at, dict):
                    at[draw(st.sampled_from(["x", "__metadata__", "shape", "\ud800"]))] = at.pop(
                        key
                    )
                case _:
                    at[draw(st.sampled_from(keys))] = json.loads(json.dumps(at[key]))
            break
    text = json.dumps(
        header,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([None, (",", ":")])),
    )
    return file_bytes(text.encode(errors="surrogatepass"), 32)


@st.composite
def changed_text(draw: st.DrawFn) -> bytes:
    """SOUND with pieces of its text removed and tokens inserted; the header's size is right."""
    text = json.dumps(SOUND, ensure_ascii=draw(st.booleans()), separators=(",", ":"))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at] + draw(st.sampled_from(["", *TOKENS])) + text[at + draw(st.integers(0, 3)) :]
        )
    return file_bytes(text.encode(), draw(st.sampled_from([32, 32, 32, 31, 33])))


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """The file of SOUND with bytes overwritten, inserted or removed anywhere."""
    content = bytearray(draw(st.sampled_from([file_bytes(SOUND, 32), AS_WRITTEN])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.one_of(st.integers(0, 9), st.integers(0, len(content))))
        content[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / SINGLE


@given(content=st.one_of(changed_values(), changed_text(), changed_bytes()))
@example(content=file_bytes(SOUND, 32))
@example(content=AS_WRITTEN)
@settings(max_examples=1500, deadline=None)
def test_random_damage_is_rejected_or_safetensors_agrees(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    try:
        tensors, metadata = read_file_header(scratch)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        assert content not in (file_bytes(SOUND, 32), AS_WRITTEN), "the sound file was rejected"
        return
    try:
        assert by_us(tensors) == by_safetensors(scratch)
        with safe_open(scratch, framework="np") as file:
            assert metadata == (file.metadata() or {})
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors rejects: {error}")


def entry_text(name: str, dtype: str, shape: str, begin: int, end: int) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


A8 = entry_text("a", "F32", "[2]", 0, 8)
BIG = "9" * 5000
LIKE_WRITTEN = [
    A8,
    f"{A8} ",
    f" {A8}",
    f"{A8},",
    f",{A8}",
    f"{A8},{A8}",
    f"{A8}{A8}",
    f"{A8}x",
    f"{A8}}}{{",
    f'"__metadata__":{{}},{A8}',
    f'"__metadata__":{{"a":"b"}},{A8}',
    f'"__metadata__":{{"a":1}},{A8}',
    f'"__metadata__":{{"a":"b","a":"c"}},{A8}',
    f'"__metadata__":{{"a":"b",}},{A8}',
    f'"__metadata__":{{[[}},{A8}',
    f'"__metadata__":{{"\\ud800":"b"}},{A8}',
    f'"__metadata__":{{"{{":"}}"}},{A8}',
    f'"__metadata__":[],{A8}',
    f'{A8},"__metadata__":{{}}',
    A8.replace('"a"', '"\\u0061"'),
    A8.replace('"a"', '"__metadata__"'),
    A8.replace('"a"', '"a\nb"'),
    A8.replace('"a"', '"a\x7f"'),
    A8.replace('"a"', '""'),
    entry_text("a", "F32", "[02]", 0, 8),
    entry_text("a", "F32", "[2,]", 0, 8),
    entry_text("a", "F32", "[,]", 0, 8),
    entry_text("a", "F32", "[-0]", 0, 0),
    entry_text("a", "f32", "[2]", 0, 8),
    entry_text("a", "C64", "[1]", 0, 8),
    entry_text("a", "F32", f"[{BIG}]", 0, 8),
    entry_text("a", "F32", f"[0,{2**63}]", 0, 0) + "," + A8.replace('"a"', '"b"'),
    entry_text("a", "F32", f"[{2**40},{2**40},0]", 0, 0) + "," + A8.replace('"a"', '"b"'),
    entry_text("a", "F64", "[]", 0, 8),
    entry_text("a", "F32", "[1]", 4, 8) + "," + entry_text("b", "F32", "[1]", 0, 4),
    entry_text("a", "F32", "[1]", 4, 8),
    entry_text("a", "F32", "[1]", 0, 4),
    entry_text("a", "F32", "[3]", 0, 12),
    entry_text("a", "F32", "[2]", 0, 4),
    A8.replace('"dtype":"F32","shape":[2]', '"shape":[2],"dtype":"F32"'),
    A8.replace("[0,8]", "[00,8]"),
    A8.replace("[0,8]", "[-0,8]"),
    A8.replace("[0,8]", "[0,8,8]"),
    A8.replace("[0,8]}", '[0,8],"x":1}'),
    A8.replace(":", ": "),
    entry_text("a", "F32", "[1]", 0, 4) + "," + entry_text("a", "F32", "[1]", 4, 8),
    f'"__metadata__":{{"a":{"[" * 100_000}}},{A8}',
]


@pytest.mark.parametrize("text", LIKE_WRITTEN)
def test_almost_canonical_header_is_rejected_or_safetensors_agrees(
    scratch: Path, text: str
) -> None:
    test_random_damage_is_rejected_or_safetensors_agrees.hypothesis.inner_test(
        scratch, file_bytes(f"{{{text}}}".encode())
    )


@given(content=st.one_of(changed_values(), changed_text(), changed_bytes()))
@example(content=AS_WRITTEN)
@settings(max_examples=300, deadline=None)
def test_canonical_headers_are_read_alike_both_ways(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "_validated", lambda *_: None)
        with suppress(CheckpointError):
            if found := read_file_header(scratch):
                patch.undo()
                header = content[8 : 8 + int.from_bytes(content[:8], "little")]
                stamp = next(iter(found[0].values())).stamp
                assert headers._validated(scratch, header, stamp) == found
