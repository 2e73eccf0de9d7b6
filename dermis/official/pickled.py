"""Read a pickle as data: opcodes become plain values and `Call` records, and nothing is ever imported or called.

The standard unpickler runs what a file requests. This reader iterates over the opcodes with `pickletools.genops`, stores a
"call" (REDUCE, NEWOBJ, BUILD) as a record, and refuses every name that is not on the caller's list. Memory is limited to a
small multiple of the file: no opcode can request more than its own bytes. A file can still need much time, so foreign files
are read in a process with limits (`isolation.py`).
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from dermis.errors import BundleError, escape, quote

MAX_OPCODES = 5_000_000  # an official 1024 px snapshot has some 100,000
_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMO_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_MEMO_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MAX_INDEX = 1 << 31  # largest index of the memo, and largest integer as a key


class Stream(Protocol):
    """A binary file, `io.BytesIO` or `mmap.mmap`."""

    def read(self, n: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names, as "module.name"."""

    name: str


@dataclass(eq=False)
class Call:
    """A call that the pickle requests: "module.name"(*args), then its state and its dictionary items."""

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Persistent:
    """A persistent id, by which torch's files refer to their storages."""

    pid: Any


def read_pickle(stream: Stream, allowed: Collection[str], persistent: bool = False) -> Any:
    """Read the next pickle in a stream. The stream is at the end of the pickle afterwards.

    Args:
        stream: The stream.
        allowed: Names that the pickle can refer to.
        persistent: Whether it can have persistent ids.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, set, dict, and the records above.

    Raises:
        BundleError: A name is not in `allowed`, an opcode does not belong into a checkpoint, or the data are damaged.
    """
    try:
        return _read(stream, allowed, persistent)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {escape(error, 120)}"
        if isinstance(error, ValueError) and not stream.read(1):
            raise BundleError(
                f"is truncated or damaged: its {stream.tell():,} bytes end before the end of the pickle; download it "
                f"again and compare its size ({reason})"
            ) from None
        raise BundleError(f"is not a pickle, or is damaged; download it again ({reason})") from None


def _read(stream: Stream, allowed: Collection[str], persistent: bool) -> Any:
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if count > MAX_OPCODES:
            raise BundleError(
                f"has more than {MAX_OPCODES:,} pickle operations; this is not a StyleGAN2-ADA checkpoint"
            )
        op = opcode.name
        if op in _LITERALS:
            stack.append(arg)
        elif op in _MEMO_PUT:
            memo[_key(int(arg))] = stack[-1]  # type: ignore[arg-type]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in _MEMO_GET:
            stack.append(memo[int(arg)])  # type: ignore[arg-type]
        elif op == "MARK":
            marks.append(stack)
            stack = []
        elif op in _TUPLES:
            stack[-_TUPLES[op] :] = [tuple(_last(stack, _TUPLES[op]))]
        elif op in ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK"):
            items, stack = stack, marks.pop()
            _close_mark(op, items, stack)
        elif op == "APPEND":
            item = stack.pop()
            _append(stack[-1], [item])
        elif op == "SETITEM":
            pair = _last(stack, 2)
            del stack[-2:]
            _set_items(stack[-1], pair)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            if op == "GLOBAL":
                module, _, qualname = str(arg).partition(" ")
            else:
                module, qualname = _last(stack, 2)
                del stack[-2:]
            stack.append(_global(module, qualname, allowed))
        elif op in ("REDUCE", "NEWOBJ"):
            function, args = _last(stack, 2)
            stack[-2:] = [_call(function, args)]
        elif op == "NEWOBJ_EX":
            function, args, kwargs = _last(stack, 3)
            if kwargs:
                raise BundleError("constructs an object with keyword arguments, as no official checkpoint does")
            stack[-3:] = [_call(function, args)]
        elif op == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Call) or stack[-1].state is not None:
                raise BundleError("sets the state of something that is not an object, as no official checkpoint does")
            stack[-1].state = state
        elif op == "BINPERSID" and persistent:
            stack.append(Persistent(stack.pop()))
        elif op == "POP":
            stack.pop()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "STOP":
            if len(stack) != 1 or marks:
                raise ValueError("unbalanced stack")
            return stack[0]
        elif op not in ("PROTO", "FRAME"):
            stack.append(_empty(op))
    raise ValueError("no STOP")  # for mypy: genops raises first


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("stack underflow")
    return stack[-count:]


def _empty(op: str) -> Any:
    """Return a constant or an empty container. Every other opcode is refused here."""
    if op in ("NONE", "NEWTRUE", "NEWFALSE"):
        return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op]
    if op in ("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET"):
        return {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}[op]()
    raise BundleError(f"uses the pickle operation {op}, which no official checkpoint needs")


def _close_mark(op: str, items: list[Any], stack: list[Any]) -> None:
    if op == "TUPLE":
        stack.append(tuple(items))
    elif op == "LIST":
        stack.append(items)
    elif op == "DICT":
        stack.append({})
        _set_items(stack[-1], items)
    elif op == "FROZENSET":
        stack.append(frozenset(_hashable(items)))
    elif op == "APPENDS":
        _append(stack[-1], items)
    elif op == "SETITEMS":
        _set_items(stack[-1], items)
    elif op == "ADDITEMS":
        if not isinstance(stack[-1], set):
            raise TypeError("ADDITEMS on something that is not a set")
        stack[-1].update(_hashable(items))


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise TypeError("APPEND on something that is not a list")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    mapping = target.items if isinstance(target, Call) else target
    if not isinstance(mapping, dict) or len(items) % 2:
        raise TypeError("SETITEMS on something that is not a dictionary")
    mapping.update(zip(_hashable(items[::2]), items[1::2], strict=True))


def _hashable(keys: list[Any]) -> list[Any]:
    for key in keys:
        _key(key)
    return keys


def _key(key: Any) -> Any:
    """Refuse keys whose hash is slow (a deeply shared tuple takes exponential time) or can be made to collide.

    The hash of a number is the number modulo 2^61 - 1: a dictionary of multiples of it takes quadratic time. The hashes of
    text and bytes depend on a random number of this process.
    """
    small = isinstance(key, int) and -_MAX_INDEX < key < _MAX_INDEX
    if not small and not isinstance(key, str | bytes | None):
        raise TypeError(f"a {'large number' if isinstance(key, int) else type(key).__name__} as a key")
    return key


def _global(module: Any, qualname: Any, allowed: Collection[str]) -> Global:
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise BundleError("names a class or function by something that is not a text, as no official checkpoint does")
    name = f"{module}.{qualname}"
    if name not in allowed:
        hint = "do not load it"
        if "tflib" in name[:200]:
            hint = "this is a TensorFlow checkpoint; convert it to PyTorch first, with legacy.py of the official code"
        raise BundleError(f"refers to {quote(name)}, which is not part of a StyleGAN2-ADA checkpoint: {hint}")
    return Global(name)


def _call(function: Any, args: Any) -> Call:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise BundleError("calls something that is not a named class or function, as no official checkpoint does")
    return Call(function.name, args)
