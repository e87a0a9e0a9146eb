"""What a request's pages hold, and which of them others may use. No torch."""
