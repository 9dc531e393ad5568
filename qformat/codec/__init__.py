"""Numbers to codes and back: the NF4 codec of spec sections 4 to 6. Pure functions on arrays, no I/O."""
