"""HTTP by noun: decode, authenticate, call one use-case, encode."""

from .factory import create_rest_app

__all__ = ["create_rest_app"]
