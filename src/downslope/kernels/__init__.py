"""Executors: what runs a traced chain over real tensors. Nothing else writes parameters and state."""
