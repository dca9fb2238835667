"""Methods that keep no subspace: plain LoRA, bounds, replay and regularisers."""
