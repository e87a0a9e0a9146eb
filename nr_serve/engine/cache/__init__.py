"""The KV cache's pages: what they hold, and which of them other requests may use. No torch."""
