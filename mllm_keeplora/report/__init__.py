"""What people look at: a run's page, a comparison, published numbers beside one's own."""
