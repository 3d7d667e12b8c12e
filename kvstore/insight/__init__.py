"""What the store knows of itself: how often blocks come again, what more memory would bring, why a block is gone."""
