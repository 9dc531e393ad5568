"""Operations on 4-bit weights as torch operations, with implementations in numba, Triton and plain torch."""
