"""The Python SDK: chat as one device of one user (`Client`), or as a backend (`Rest`)."""
