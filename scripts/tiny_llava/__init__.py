"""How the bundled base model `tiny-llava` is made: tokenizer, corpus, network, training stages, gate."""
