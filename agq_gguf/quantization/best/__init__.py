"""`--quality best`: quantizes matrices with the help of gradients, one stage of the graph after another."""
