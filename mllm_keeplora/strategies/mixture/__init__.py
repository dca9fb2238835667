"""Methods whose branches are weighed when a question is answered."""
