"""Bytes and operations of a compiled program, counted from its text.

Knows XLA's HLO syntax. `cost_analysis()` will not do for bytes: it counts what an
operation touches in on-chip memory like what it touches in device memory, and a weight
that is prefetched on chip twice.
"""

import re
from dataclasses import dataclass

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
# Which operand holds what is put into the first one.
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}
# They move nothing by themselves.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_FREE |= {"opt-barrier", "after-all", "partition-id", "copy-done", "async-done"}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), ...`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def device_bytes(text: str) -> int:
    """Bytes that the entry computation reads from and writes to device memory.

    A gather counts what it takes and a scatter what it puts, not the array; a Pallas
    kernel what its cost estimate says.
    """
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert entry is not None, "the program has no entry"
    instructions = computations[entry[1]]
    shapes = {i.name: i.shape for i in instructions}
    return sum(_bytes_of(i, shapes, computations) for i in instructions)


def kernel_flops(text: str) -> int:
    """Operations of all Pallas kernels, by their cost estimates."""
    return sum(int(flops) for flops in re.findall(r'"flops":"?(\d+)', text))


def _bytes_of(instruction, shapes, computations) -> int:
    operands = [shapes.get(name, "") for name in instruction.operands]
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0
    if opcode == "custom-call":
        found = re.search(r'"bytes_accessed":"?(\d+)', instruction.rest)
        if found:
            return int(found[1])
    if opcode in ("copy-start", "slice-start"):  # from one memory to another
        arrays = _ARRAY.findall(instruction.shape)[:2]
        return sum(_array_bytes(*array) for array in arrays)
    called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    if opcode == "fusion" and called:
        inside = computations[called[1]]
        return _fusion_bytes(instruction.shape, operands, inside)
    if opcode in ("gather", "dynamic-slice"):
        return 2 * _shape_bytes(instruction.shape)
    if opcode in _UPDATES:
        return 2 * _shape_bytes(operands[_UPDATES[opcode]])
    return _shape_bytes(instruction.shape) + sum(map(_shape_bytes, operands))


def _fusion_bytes(shape: str, operands: list[str], inside: list[Instruction]) -> int:
    by_name = {i.name: i for i in inside}
    output = _shape_bytes(shape)
    taken: dict[int, int] = {}
    for instruction in inside:
        if instruction.opcode in ("gather", "dynamic-slice"):
            place = _parameter(instruction.operands[0], by_name)
            if place is not None:
                size = _shape_bytes(instruction.shape, any_memory=True)
                taken[place] = taken.get(place, 0) + size
        if instruction.opcode in _UPDATES:
            place = _parameter(instruction.operands[0], by_name)
            update = instruction.operands[_UPDATES[instruction.opcode]]
            size = _shape_bytes(by_name[update].shape, any_memory=True)
            if place is not None:
                taken[place] = 0  # overwritten, not read
                output = output - _shape_bytes(instruction.shape) + size
    total = output
    for place, operand in enumerate(operands):
        size = _shape_bytes(operand)
        total += min(size, taken[place]) if place in taken else size
    return total


def _parameter(name: str, by_name: dict[str, Instruction]) -> int | None:
    """The fusion parameter behind a name, through what only renames it."""
    while name in by_name:
        instruction = by_name[name]
        if instruction.opcode == "parameter":
            return int(instruction.rest.split(")")[0])
        if instruction.opcode not in ("bitcast", "reshape", "copy"):
            return None
        name = instruction.operands[0]
    return None


def _computations(text: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and " = " not in line:
            current = found.setdefault(header[1], [])
            continue
        match = _INSTRUCTION.match(line)
        if match:
            name, shape, opcode, rest = match.groups()
            inner = rest.split("), ")[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", inner))
            current.append(
                Instruction(
                    name=name, shape=shape, opcode=opcode, operands=operands, rest=rest
                )
            )
    return found


def _shape_bytes(shape: str, *, any_memory: bool = False) -> int:
    return sum(
        _array_bytes(*array, any_memory=any_memory) for array in _ARRAY.findall(shape)
    )


def _array_bytes(dtype: str, sizes: str, layout: str, any_memory: bool = False) -> int:
    """Zero for arrays in on-chip memory, whose layout says S(1) or higher."""
    if dtype not in _ITEM_BYTES or (re.search(r"S\([1-9]", layout) and not any_memory):
        return 0
    size = _ITEM_BYTES[dtype]
    for length in filter(None, sizes.split(",")):
        size *= int(length)
    return size
