"""The stages of the main job, a file each, named as in the ledger."""
