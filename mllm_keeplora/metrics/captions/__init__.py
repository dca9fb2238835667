"""Scores of captions over a whole set: BLEU, METEOR, ROUGE-L and CIDEr as the official tools compute them."""
