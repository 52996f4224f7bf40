"""A real ComfyUI to test in: `make_host.py` makes one, `server.py` runs it."""
