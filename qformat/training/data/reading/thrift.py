"""Reads structs of Thrift's compact protocol, in which Parquet files describe themselves.

Source: the specification of the compact protocol of Apache Thrift. Arrow ends the process for some damaged descriptions
when Python asks for a part of them, so that qformat reads the few numbers that it needs by itself.
"""

from __future__ import annotations

from typing import TypeAlias

Value: TypeAlias = "bool | int | bytes | list[Value] | Struct | None"
Struct: TypeAlias = "dict[int, Value]"
"""The fields of a struct by their numbers."""

MAX_VALUES = 2**21
MAX_DEPTH = 16
_MAX_VARINT_NBYTES = 10

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)
_FIXED_NBYTES = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_LONG_LIST = 15


def read_struct(data: bytes, *, last: int | None = None) -> Struct:
    """Return the struct at the beginning of some bytes. Numbers that are not integers are returned as bytes.

    Args:
        data: The struct, and possibly more bytes behind it.
        last: Number of the last field to read. None reads all fields. Writers put fields in ascending order.

    Raises:
        ValueError: The bytes are not a struct, or it has too many values.
    """
    return _Reader(data).struct(0, last)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._n_values = 0

    def struct(self, depth: int, last: int | None = None) -> Struct:
        if depth > MAX_DEPTH:
            raise ValueError(f"a description is nested more than {MAX_DEPTH} times")
        fields: Struct = {}
        number = 0
        while number != last and (kind := self._byte()):
            step = kind >> 4
            number = number + step if step else self._signed()
            fields[number] = self._value(kind & 0xF, depth, in_list=False)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool) -> Value:
        self._n_values += 1
        if self._n_values > MAX_VALUES:
            raise ValueError(f"a description has more than {MAX_VALUES:,} values")
        if kind in (_TRUE, _FALSE):
            return self._byte() == _TRUE if in_list else kind == _TRUE
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _MAP:
            self._map(depth)
            return None
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind in _FIXED_NBYTES:
            return self._bytes(_FIXED_NBYTES[kind])
        raise ValueError(f"a description has a value of the unknown type {kind}")

    def _list(self, depth: int) -> list[Value]:
        if depth > MAX_DEPTH:
            raise ValueError(f"a description is nested more than {MAX_DEPTH} times")
        head = self._byte()
        n = self._unsigned() if head >> 4 == _LONG_LIST else head >> 4
        return [self._value(head & 0xF, depth + 1, in_list=True) for _ in range(n)]

    def _map(self, depth: int) -> None:
        """Pass over a map. Parquet has none."""
        n = self._unsigned()
        kinds = self._byte() if n else 0
        for _ in range(n):
            self._value(kinds >> 4, depth + 1, in_list=True)
            self._value(kinds & 0xF, depth + 1, in_list=True)

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, n: int) -> bytes:
        found = self._data[self._position : self._position + n]
        if len(found) < n:
            raise ValueError("a description ends early")
        self._position += n
        return found

    def _unsigned(self) -> int:
        value = 0
        for index in range(_MAX_VARINT_NBYTES):
            byte = self._byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value
        raise ValueError("a description has a number that is too long")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
