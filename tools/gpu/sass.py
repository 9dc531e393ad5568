"""Parse a disassembly of NVIDIA machine code and find its longest loop and its longest path."""

from __future__ import annotations

import re

Instruction = tuple[int, str]
"""Address and text of an instruction."""


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of a disassembly, without the padding after the last one."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, flags=re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in found]
    while instructions and (
        opcode(instructions[-1][1]) == "NOP" or branch_target(instructions[-1][1]) == instructions[-1][0]
    ):
        instructions.pop()
    return instructions


def opcode(text: str) -> str:
    """Return the opcode without modifiers: `FMUL` for `@!P0 FMUL.FTZ R1, R2, R3`."""
    words = text.split()
    return words[1 if words[0].startswith("@") else 0].split(".")[0]


def branch_target(text: str) -> int | None:
    """Return the address that a branch jumps to, or None for any other instruction."""
    found = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)
    return int(found.group(1), 16) if found else None


def longest_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Return the body of the longest loop: from the target of a backward branch to that branch."""
    place = {address: i for i, (address, _) in enumerate(instructions)}
    loops = []
    for i, (address, text) in enumerate(instructions):
        target = branch_target(text)
        if target is not None and target < address:
            loops.append(instructions[place[target] : i + 1])
    return max(loops, key=len)


def longest_path(instructions: list[Instruction]) -> list[Instruction]:
    """Return the longest path from the entry to an exit along forward branches; it has each loop body once."""
    place = {address: i for i, (address, _) in enumerate(instructions)}
    length = [0] * (len(instructions) + 1)
    following = [len(instructions)] * len(instructions)
    for i in reversed(range(len(instructions))):
        text = instructions[i][1]
        conditional = text.startswith("@") or re.search(r"\bBRA\S*\s+!?U?P\d", text) is not None
        target = branch_target(text)
        successors = []
        if target is not None and place.get(target, -1) > i:
            successors.append(place[target])
        if opcode(text) not in ("EXIT", "BRA") or conditional or (target is not None and place.get(target, -1) <= i):
            successors.append(i + 1)
        if successors:
            following[i] = max(successors, key=lambda j: length[j])
        length[i] = 1 + (length[following[i]] if successors else 0)
        if not successors:
            following[i] = len(instructions)
    path, i = [], 0
    while i < len(instructions):
        path.append(instructions[i])
        i = following[i]
    return path
