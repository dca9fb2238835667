"""How the pictures of `mini_mtil` are taken from packages of pictures, fonts and data sets."""
