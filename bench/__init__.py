"""Load scenarios against a real server process. `python -m bench --list`; `bench/README.md` keeps the last results."""
