"""Ranks: layout, communicators, control channel, and the exchange of tokens between experts."""
