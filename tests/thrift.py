"""Thrift's compact protocol as trees that tests can change: Parquet's footers and page headers are written in it.

A struct is a dictionary: field number to (type, value). A list is a list of (type, value). See the specification,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from collections.abc import Iterator
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
Tree = dict[int, tuple[int, Any]]


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if raw[at - 1] < 128:
            return value, at


def _pack_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _unpack(kind: int, raw: bytes, at: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return raw[at], at + 1
    if kind in (I16, I32, I64):
        value, at = _varint(raw, at)
        return value >> 1 ^ -(value & 1), at
    if kind == DOUBLE:
        return raw[at : at + 8], at + 8
    if kind == BINARY:
        length, at = _varint(raw, at)
        return raw[at : at + length], at + length
    if kind in (LIST, SET):
        inner, size = raw[at] & 15, raw[at] >> 4
        at += 1
        if size == 15:
            size, at = _varint(raw, at)
        items = []
        for _ in range(size):
            if inner in (TRUE, FALSE):
                item, at = raw[at], at + 1
            else:
                item, at = _unpack(inner, raw, at)
            items.append((inner, item))
        return items, at
    assert kind == STRUCT
    return unpack_struct(raw, at)


def unpack_struct(raw: bytes, at: int = 0) -> tuple[Tree, int]:
    """Read a struct; return it, and where it ends."""
    tree: Tree = {}
    number = 0
    while raw[at]:
        kind, step = raw[at] & 15, raw[at] >> 4
        at += 1
        if step:
            number += step
        else:
            zigzag, at = _varint(raw, at)
            number = zigzag >> 1 ^ -(zigzag & 1)
        value, at = _unpack(kind, raw, at)
        tree[number] = (kind, value)
    return tree, at + 1


def _pack(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([value])
    if kind in (I16, I32, I64):
        return _pack_varint((value << 1 ^ value >> 63) & (1 << 64) - 1)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _pack_varint(len(value)) + value
    if kind in (LIST, SET):
        inner = value[0][0] if value else STRUCT
        head = bytes([len(value) << 4 | inner]) if len(value) < 15 else bytes([0xF0 | inner]) + _pack_varint(len(value))
        return head + b"".join(bytes([item]) if inner in (TRUE, FALSE) else _pack(inner, item) for _, item in value)
    return pack_struct(value)


def pack_struct(tree: Tree) -> bytes:
    """Write a struct."""
    out, last = b"", 0
    for number, (kind, value) in sorted(tree.items()):
        step = number - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _pack_varint(number << 1)
        out += _pack(kind, value)
        last = number
    return out + b"\0"


def leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every (type, value) in a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        kind, value = tree[key]
        yield tree, key
        if kind in (LIST, SET, STRUCT):
            yield from leaves(value)
