"""The commands of the `tidings` command line, one module per noun."""
