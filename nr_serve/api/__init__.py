"""The HTTP face of the server. Never imports torch: it talks to the engine in plain messages."""
