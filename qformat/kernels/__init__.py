"""Codes to products: the operations on 4-bit weights and their implementations (torch)."""
