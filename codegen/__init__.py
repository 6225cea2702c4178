"""Turns fused groups into readable Triton source, and says what they cost."""
