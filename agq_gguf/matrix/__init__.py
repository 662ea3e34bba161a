"""Quantizes one matrix. Arrays in, arrays out."""
