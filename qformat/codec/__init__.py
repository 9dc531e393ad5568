"""The NF4 codec: pure functions that encode arrays of numbers and decode them, without I/O (spec sections 4 to 6)."""
