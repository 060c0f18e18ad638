"""HTTP by noun: decode, authenticate, call one use-case, encode."""
