"""Training: recipes, text, closed-form gates, the loop that makes an adapter."""
