"""Parsing a disassembly: its instructions, the longest loop and the longest path."""

from __future__ import annotations

from tools.gpu.sass import longest_loop, longest_path, opcode, parse

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 BRA 0x50 ;
        /*0020*/                   FMUL.FTZ R1, R1, R2 ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
        /*0070*/                   NOP;
"""


def test_a_disassembly_is_parsed_without_its_padding() -> None:
    instructions = parse(SASS)
    assert [opcode(text) for _, text in instructions] == ["S2R", "BRA", "FMUL", "FADD", "BRA", "EXIT"]


def test_the_longest_loop_and_path_of_a_disassembly() -> None:
    instructions = parse(SASS)
    assert [address for address, _ in longest_loop(instructions)] == [0x20, 0x30, 0x40]
    assert [address for address, _ in longest_path(instructions)] == [0x00, 0x10, 0x20, 0x30, 0x40, 0x50]
