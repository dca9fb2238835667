"""Many runs: choose settings, run seeds, put them side by side."""
