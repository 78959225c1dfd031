"""Studies of the core's own designs. Those of one vendor's hardware live in its plugin."""
