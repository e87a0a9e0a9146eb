"""The server's HTTP API. Never imports torch: it talks to the engine in plain messages."""
