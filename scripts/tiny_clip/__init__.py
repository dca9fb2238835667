"""How the bundled base `tiny-clip` is made: words, pictures with captions, network, training, gates."""
