"""What is looked at before a GPU is used: config, data, base, memory."""
