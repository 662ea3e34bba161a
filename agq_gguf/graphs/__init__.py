"""Runs models in PyTorch, with gradients. The graph is the one that llama.cpp builds; no architecture is known here.

`trace` records llama.cpp's graph for a chunk of tokens, `ir` turns its memory operations into data flow, `ops` says
what each operation computes, and `run` executes the result. `parts` finds stages (matrices with one input) and norms,
`segments` the places where little is alive, `gradients` goes backward from one to the next, and `levelled` finds pairs
of matrices between which channels may be scaled. `support` opens a model's graph if it is the same function as
llama.cpp's, and says why if it is not.
"""
