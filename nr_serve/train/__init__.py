"""Training: recipes, text, fitted gates, the loop that makes an adapter."""
