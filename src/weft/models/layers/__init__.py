"""The mathematics a decoder is made of."""
