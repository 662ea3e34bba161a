"""Quantizes one matrix: arrays in, arrays out."""
