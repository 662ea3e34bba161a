"""`python -m agq_gguf`: the command line."""

from agq_gguf.cli.app import main

main()
