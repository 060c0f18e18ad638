"""Envelope encryption: root key → app key → stream key, AES-256-GCM, every box bound to its row.

`keyring.Keyring` is what the rest of the server uses; `base.RootKeyProvider` is the port for whatever holds the
root keys, and `keyfile.KeyFile` its adapter for a file on disk.
"""
