"""Compares sizes of one model: llama.cpp's types and ours, their quality and speed, in one table and one picture."""
