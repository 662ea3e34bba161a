"""`--quality best`: matrices are quantized with gradients, one stage of the graph after the other."""
