"""L1: pure tensor maths."""
