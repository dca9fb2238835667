"""What a run needs of its machine: files, logs, processes, signals. Knows no model and no run."""
