"""The largest number of rows of x for which a product uses the codes directly instead of decoding the weight first."""

MAX_ROWS_FROM_CODES = 16
"""Largest number of rows of x for a product from codes. With more rows, the backends decode the weight and let torch
multiply. The Triton kernel would decode the weight again for every 16 rows, the size of one tensor-core operand. On a
CPU, 16 rows take 0.25 to 0.68 of the time of decoding plus torch's product (2 cores with AVX512-BF16, measured with
`python -m tools.bench.kernels --crossover`)."""
