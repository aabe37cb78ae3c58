"""Runnable examples; `digits_lvlm` holds the small model that demos, tests and benchmarks use."""
