"""Up to how many rows of x a product takes the weight's codes as they are, instead of decoding the weight first."""

MAX_ROWS_FROM_CODES = 16
"""The Triton kernel decodes the weight again for every 16 rows, which is what one operand of the tensor cores takes.
On a CPU, 16 rows take 0.25 to 0.68 of the time of decoding and torch's product, as `python -m tools.bench.kernels
--crossover` measures it (2 cores with AVX512-BF16). From here on the backends decode the weight and leave the product
to torch."""
