from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.encoding.tensors import CODECS, DTYPES, GROUP, TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.errors import BadResult, LocalProtocolError, RemoteProtocolError, UnsupportedFeature

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/tensors.json").read_text())
MAX_ELEMENTS = 4096

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
codecs = pytest.mark.parametrize("codec", CODECS)


def named(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def travelled(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    header, parts = encode_tensor(tensor, codec=codec)
    body = b"".join(parts)
    assert len(body) == header.body_bytes
    received = TensorHeader.from_fields(header.to_fields(), max_elements=tensor.numel())
    assert received == header
    return decode_tensor(received, body)


# The published vectors.


@named(VECTORS["valid"])
def test_a_vector_decodes_to_its_values(case: dict[str, Any]) -> None:
    header = TensorHeader.from_fields(case["header"], max_elements=MAX_ELEMENTS)
    decoded = decode_tensor(header, bytes.fromhex(case["body"]))
    assert decoded.dtype == DTYPES[header.dtype]
    assert decoded.tolist() == case["values"]


@named([case for case in VECTORS["valid"] if case["header"]["codec"] == "exact"])
def test_an_exact_vector_encodes_to_its_bytes(case: dict[str, Any]) -> None:
    _, parts = encode_tensor(torch.tensor(case["values"], dtype=DTYPES[case["header"]["dtype"]]))
    assert b"".join(parts).hex() == case["body"]


@named(VECTORS["invalid_headers"])
def test_an_invalid_header_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="tensor"):
        TensorHeader.from_fields(case["header"], max_elements=case["max_elements"])


@named(VECTORS["invalid_bodies"])
def test_an_invalid_body_is_refused(case: dict[str, Any]) -> None:
    header = TensorHeader.from_fields(case["header"], max_elements=MAX_ELEMENTS)
    with pytest.raises(RemoteProtocolError, match="tensor"):
        decode_tensor(header, bytes.fromhex(case["body"]))


# Exact.


@dtypes
@pytest.mark.parametrize("shape", [(1,), (1, 576), (3, 5), (2, 3, 64), (2, 2, 2, 65)])
def test_exact_values_arrive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = normal(*shape, dtype=dtype)
    got = travelled(sent, "exact")
    assert got.dtype == dtype
    assert got.shape == sent.shape
    assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))


@dtypes
def test_the_smallest_the_largest_and_minus_zero_are_exact(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    sent = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal, -0.0, 0.0], dtype=dtype)
    assert torch.equal(travelled(sent, "exact").view(torch.uint8), sent.view(torch.uint8))


def test_a_contiguous_tensor_is_sent_from_its_own_memory() -> None:
    sent = normal(2, 8)
    _, (body,) = encode_tensor(sent)
    sent[0, 0] = 7.0
    assert struct.unpack_from("<f", body) == (7.0,)


@codecs
def test_a_strided_tensor_is_sent_in_row_major_order(codec: str) -> None:
    sent = normal(64, 6).T[::2]
    assert torch.equal(travelled(sent, codec), travelled(sent.contiguous(), codec))


def test_a_writable_body_is_not_copied() -> None:
    sent = normal(2, 8)
    header, parts = encode_tensor(sent)
    body = bytearray(b"".join(parts))
    got = decode_tensor(header, memoryview(body))
    struct.pack_into("<f", body, 0, 7.0)
    assert got[0, 0] == 7.0


@codecs
@dtypes
def test_a_body_may_lie_at_any_offset_of_a_frame(codec: str, dtype: torch.dtype) -> None:
    sent = normal(3, 70, dtype=dtype)
    header, parts = encode_tensor(sent, codec=codec)
    frame = bytearray(b"x") + b"".join(parts)
    assert torch.equal(decode_tensor(header, memoryview(frame)[1:]), travelled(sent, codec))


def test_a_gradient_s_history_does_not_travel() -> None:
    sent = normal(2, 8).requires_grad_()
    assert not travelled(sent * 2, "exact").requires_grad


@codecs
def test_values_are_first_rounded_to_the_asked_dtype(codec: str) -> None:
    sent = normal(2, 64)
    header, parts = encode_tensor(sent, codec=codec, dtype=torch.bfloat16)
    got = decode_tensor(header, b"".join(parts))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, travelled(sent.bfloat16(), codec))


# int8.


@dtypes
@pytest.mark.parametrize("width", [1, 63, 64, 65, 576, 1000])
@pytest.mark.parametrize("magnitude", [1e-7, 1e-6, 1e-3, 1.0, 300.0, 6e4])
def test_int8_errs_by_at_most_half_a_scale(dtype: torch.dtype, width: int, magnitude: float) -> None:
    sent = (normal(4, width).clamp(-1, 1) * magnitude).to(dtype)
    got = travelled(sent, "int8")
    assert got.dtype == dtype
    for start in range(0, width, GROUP):
        group = sent[:, start : start + GROUP].double()
        peaks = group.abs().amax(dim=1, keepdim=True)
        scale = peaks / 127 * (1 + 2.0**-11) + 2.0**-24
        allowed = scale / 2 + torch.finfo(dtype).eps * peaks
        assert ((got[:, start : start + GROUP].double() - group).abs() <= allowed).all()


def test_an_outlier_harms_only_its_own_group() -> None:
    sent = normal(1, 3 * GROUP)
    alone = travelled(sent, "int8")
    sent[0, GROUP] = 1e5
    got = travelled(sent, "int8")
    assert torch.equal(got[:, :GROUP], alone[:, :GROUP])
    assert torch.equal(got[:, 2 * GROUP :], alone[:, 2 * GROUP :])


def test_a_row_is_encoded_alike_whatever_its_neighbours() -> None:
    sent = normal(5, 100)
    assert torch.equal(travelled(sent, "int8")[2:3], travelled(sent[2:3], "int8"))


def test_zeros_stay_zeros_in_int8() -> None:
    assert torch.equal(travelled(torch.zeros(2, 100), "int8"), torch.zeros(2, 100))


def test_every_finite_float16_fits_int8() -> None:
    sent = torch.tensor([65504.0, -65504.0, 515.5], dtype=torch.float16)
    got = travelled(sent, "int8")
    assert ((got.float() - sent.float()).abs() <= 515.5 / 2 + 32).all()


def test_int8_holds_up_to_its_largest_scale() -> None:
    largest = torch.tensor([127 * 65504.0, -1.0])
    assert travelled(largest, "int8").tolist() == [127 * 65504.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_refuses_what_it_would_have_to_cut_off(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedFeature, match="use exact"):
        encode_tensor(torch.tensor([1e7], dtype=dtype), codec="int8")


def test_int8_takes_a_quarter_of_the_bytes() -> None:
    assert TensorHeader((1, 4096), "float32", "int8").body_bytes == 4096 + 4096 // 64 * 2


# What does not travel.


@codecs
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sender_s_non_finite_value_is_its_own_bad_result(codec: str, dtype: torch.dtype, value: float) -> None:
    sent = torch.zeros(2, 100, dtype=dtype)
    sent[1, 7] = value
    with pytest.raises(BadResult, match=f"{value} at index 107 of 200"):
        encode_tensor(sent, codec=codec)


def test_a_value_that_the_dtype_cannot_hold_is_a_bad_result() -> None:
    with pytest.raises(BadResult, match="inf at index 1"):
        encode_tensor(torch.tensor([1.0, 1e6]), dtype=torch.float16)


def test_a_sum_that_overflows_is_not_a_value_that_does() -> None:
    sent = torch.full((4,), torch.finfo(torch.float32).max)
    assert torch.equal(travelled(sent, "exact"), sent)


@pytest.mark.parametrize(
    ("tensor", "codec"),
    [
        (torch.zeros(1, dtype=torch.float64), "exact"),
        (torch.zeros(1, dtype=torch.int8), "int8"),
        (torch.zeros(1), "int4"),
        (torch.zeros(0, 8), "exact"),
        (torch.zeros(()), "exact"),
        (torch.zeros(1, 1, 1, 1, 1), "exact"),
    ],
    ids=["float64", "integers", "unknown codec", "no values", "no sides", "five sides"],
)
def test_what_no_peer_could_read_is_our_own_mistake(tensor: torch.Tensor, codec: str) -> None:
    with pytest.raises(LocalProtocolError, match="cannot send"):
        encode_tensor(tensor, codec=codec)


def test_a_refused_value_is_named() -> None:
    with pytest.raises(RemoteProtocolError, match="nan at index 2 of 3"):
        decode_tensor(TensorHeader((3,), "float32", "exact"), struct.pack("<3f", 1.0, 2.0, float("nan")))


# Whatever a stranger sends is decoded or refused, never anything else.

headers = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(1, 80), min_size=1, max_size=3),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "codec": st.sampled_from(sorted(CODECS)),
    }
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def read(fields: dict[str, Any], body: bytes) -> torch.Tensor | None:
    try:
        header = TensorHeader.from_fields(fields, max_elements=MAX_ELEMENTS)
        got = decode_tensor(header, body)
    except RemoteProtocolError:
        return None
    assert got.isfinite().all()
    assert got.numel() <= MAX_ELEMENTS
    assert got.shape == header.shape
    return got


@settings(derandomize=True, deadline=None)
@given(headers, st.sampled_from(["shape", "dtype", "codec", "more"]), values, st.binary(max_size=64))
def test_any_field_of_any_type_is_decoded_or_refused(
    fields: dict[str, Any], name: str, value: Any, body: bytes
) -> None:
    read({**fields, name: value}, body)


@settings(derandomize=True, deadline=None)
@given(headers, st.data())
def test_any_body_of_the_right_length_is_decoded_or_refused(fields: dict[str, Any], data: st.DataObject) -> None:
    header = TensorHeader(tuple(fields["shape"]), fields["dtype"], fields["codec"])
    pattern = data.draw(st.binary(min_size=1, max_size=64))
    length = min(header.body_bytes, 4 * MAX_ELEMENTS)
    read(fields, (pattern * (length // len(pattern) + 1))[:length])


@settings(derandomize=True, deadline=None)
@given(headers, st.integers(0, 2**32), st.integers(0, 255), st.integers(-1, 1))
def test_a_changed_byte_or_length_is_decoded_or_refused(
    fields: dict[str, Any], place: int, byte: int, growth: int
) -> None:
    sent = torch.ones(fields["shape"], dtype=DTYPES[fields["dtype"]])
    _, parts = encode_tensor(sent, codec=fields["codec"])
    body = bytearray(b"".join(parts))
    body[place % len(body)] = byte
    got = read(fields, bytes(body)[: len(body) + min(growth, 0)] + b"\0" * growth)
    assert growth == 0 or got is None


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-8e6, 8e6, width=32), min_size=1, max_size=130))
def test_whatever_is_encoded_can_be_decoded(numbers: list[float]) -> None:
    sent = torch.tensor(numbers)
    assert torch.equal(travelled(sent, "exact"), sent)
    assert travelled(sent, "int8").isfinite().all()
