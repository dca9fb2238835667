"""What records show: files that are decoded when a batch needs them."""
